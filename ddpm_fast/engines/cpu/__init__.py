"""CPU engine: the fp32 network as machine code, compiled by LLVM on this machine."""
