"""How good features are: metrics, linear probes, class activation maps, and rivals that need no upsampler."""
