"""The Triton backend: a module for each family of kernels, what they share, and their launchers.

One program takes every P-th tile of BLOCK voxels of one sample. How it holds the classes of a voxel is its family:

    two_classes     softmax of two classes, a label: one sigmoid
    all_classes     up to 128 classes: a tile holds all of them
    many_classes    more: in chunks, read twice (dense targets three times)

What decides the code of a kernel, its constants: GENERAL, that every class of a voxel has a target g of its own (DENSE,
or class indices as one-hot: of a sigmoid with a cross-entropy, of label smoothing together with a focal exponent or
squares, and of squares or smoothing where the classes are in chunks); DENSE, and whether its values are CHECKED;
OVERLAP, how it is measured (ABSOLUTE, SQUARED or, 0, by products); CE: 0 no cross-entropy, 1 its sums, SMOOTHED also
those for label smoothing; FOCAL: 0 without an exponent, 1 with any, SQUARE with that of 2; RESAMPLED, that target and
weight have other sizes than the logits: 1 read by the voxels' corners, CENTRES by their centres. The counts have 3
columns, or 6 with a cross-entropy (see enum Count); the coefficients 2, or 4.
"""
