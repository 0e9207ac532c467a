"""The key/value cache: the pool of pages on the device."""
