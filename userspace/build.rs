//! Builds the kernel part and hands the object to `kernel::object`; turns the messages of `proto/` into `wire`.

use std::error::Error;
use std::path::Path;

const PROTOCOLS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../proto");

fn main() -> Result<(), Box<dyn Error>> {
    kernel_part()?;
    messages()
}

fn kernel_part() -> Result<(), Box<dyn Error>> {
    let source = xtask::ebpf::source();
    for path in [
        "src",
        "abi/src",
        "Cargo.toml",
        "Cargo.lock",
        "abi/Cargo.toml",
    ] {
        println!("cargo::rerun-if-changed={}", source.join(path).display());
    }
    let object = xtask::ebpf::build()?;
    let out = std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?;
    std::fs::copy(object, Path::new(&out).join("culvert.bpf.o"))?;
    Ok(())
}

fn messages() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTOCOLS}");
    let files = [
        "authorization.proto",
        "certificate.proto",
        "discovery.proto",
        "workload.proto",
        "zds.proto",
    ];
    let descriptors = protox::compile(files, [PROTOCOLS])?;
    tonic_prost_build::configure()
        // Slices of the message as it arrived, not copies.
        .bytes(".")
        // In order, so that one workload has one encoding, of which the development control plane makes its version.
        .btree_map(".istio.workload.Workload.services")
        .compile_fds(descriptors)?;
    Ok(())
}
