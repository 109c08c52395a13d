"""Devices on which a pair can be measured."""
