//! Builds the kernel part and hands the object to `kernel::object`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
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
    std::fs::copy(object, std::path::Path::new(&out).join("culvert.bpf.o"))?;
    Ok(())
}
