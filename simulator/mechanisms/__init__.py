"""What a defense computes, defined once: the client runs it, an adversary who was told of it simulates or differentiates it.

Pure functions of tensors. Whatever is random comes in as an argument (a generator, a mask, a draw), so that neither side can reach
the other's. Where nothing else is said they run under ``torch.vmap`` and can be differentiated wherever the mechanism itself can.
"""
