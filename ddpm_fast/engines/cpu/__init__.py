"""The fp32 network on a CPU as machine code made there by LLVM: `executor.NativeExecutor`. Needs
llvmlite.
"""
