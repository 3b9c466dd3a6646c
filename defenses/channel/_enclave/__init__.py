"""A SIMULATED enclave: an ordinary process that behaves as an attested one would. No hardware guards its memory."""
