"""Other libraries' interfaces over lighterage, each a folder of its own; nothing else here imports them."""
