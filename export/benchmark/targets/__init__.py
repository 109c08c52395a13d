"""Where a pair can be measured."""
