"""A document as a sequence of groups: its layout, the groups' tensors, augmentation of bits."""
