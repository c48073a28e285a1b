"""A model with adapters: which are here, and the classes that read them."""
