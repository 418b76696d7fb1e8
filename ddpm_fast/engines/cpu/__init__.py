"""CPU engine: the fp32 network as machine code that LLVM compiles here. Needs llvmlite."""
