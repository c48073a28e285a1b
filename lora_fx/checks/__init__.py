"""Are two models one function, and is every use of an adapted weight the use of W + δ?"""
