"""Readers of our own layout for other libraries. Each module needs its library; nothing else here imports them."""
