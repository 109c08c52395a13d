"""Families of networks: each a frozen spec, a table of rows and a build function."""
