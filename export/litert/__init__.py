"""LiteRT (TFLite) files: conversion, quantization, metadata, and what is in one."""
