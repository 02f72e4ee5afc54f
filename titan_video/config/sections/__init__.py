"""Sections of the configuration in files of their own: long ones, and those of optional parts (config/parts.py)."""
