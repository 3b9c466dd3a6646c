"""Separating the records that a linear layer's update mixes: by how pictures look, then by what the network does with each."""
