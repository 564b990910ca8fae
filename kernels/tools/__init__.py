"""Look at operators from outside: what a call does, what kernels compile to. Declared operators are enumerated."""
