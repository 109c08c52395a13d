"""What squeeze-and-excitation costs: networks measured in pairs, here and on other devices."""
