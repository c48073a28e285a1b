"""A model as data: views and layouts of weights, forms of a matmul, the captured graph and its program."""
