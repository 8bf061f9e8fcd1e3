"""What a layer really multiplies: the matrix of a leaf, and statistics of the inputs it is multiplied with."""
