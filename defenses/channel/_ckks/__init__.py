"""CKKS through TenSEAL: bytes in, bytes out; knows neither Flower nor tensors."""
