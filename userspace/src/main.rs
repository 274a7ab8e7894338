use culvert::kernel::*;
#[tokio::main(flavor = "current_thread")]
async fn main() {
    let s = KernelSettings { cgroup_root: "/sys/fs/cgroup/unified/cvt".into(), cgroup_mount: "/sys/fs/cgroup/unified".into(), pin_dir: "/sys/fs/bpf/t1".into(), verdict_max_age: std::time::Duration::from_secs(300), knobs: 0 };
    match Kernel::attach(&s) {
        Ok((k, _e)) => {
            let n = Netns::open(std::path::Path::new("/proc/self/ns/net")).unwrap();
            println!("ok {:?}", k.attach_pod(&n).map_err(|e| e.to_string()));
        }
        Err(e) => println!("{e}"),
    }
}
