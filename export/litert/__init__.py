"""LiteRT (TFLite) files: conversion, quantization, metadata and inspection."""
