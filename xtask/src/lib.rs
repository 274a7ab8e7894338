//! What `cargo xtask` and the build script of the agent share: finding an eBPF toolchain and building the kernel part.

pub mod ebpf;
