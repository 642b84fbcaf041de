"""What the algorithms are made of; nothing here knows of any of them."""
