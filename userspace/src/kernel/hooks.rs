//! The hooks of the cgroup: loaded all together, then attached or, where an earlier agent left its link, given the new
//! program in place, so that no connection ever sees a hook missing.

use std::{fs::File, os::unix::fs::MetadataExt as _};

use aya::{
    Ebpf,
    programs::{
        CgroupAttachMode, CgroupSockAddr, ProgramError, ProgramFd, SockOps,
        links::{FdLink, LinkError},
    },
};
use aya_obj::generated::bpf_attach_type::{
    self, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET4_GETPEERNAME, BPF_CGROUP_INET6_CONNECT,
    BPF_CGROUP_INET6_GETPEERNAME, BPF_CGROUP_SOCK_OPS,
};

use super::{
    KernelError, KernelSettings,
    attempt::Attempt,
    neighbours,
    object::{not_attached, program, refused},
    pins::{self, Pins},
};

const SOCKET_OPS: &str = "socket_ops";

/// In the order in which they are attached: a connection that `connect` chose needs its claim published and its name known.
const ADDRESS_HOOKS: [(&str, bpf_attach_type); 4] = [
    ("peer_name4", BPF_CGROUP_INET4_GETPEERNAME),
    ("peer_name6", BPF_CGROUP_INET6_GETPEERNAME),
    ("connect4", BPF_CGROUP_INET4_CONNECT),
    ("connect6", BPF_CGROUP_INET6_CONNECT),
];

/// Lets the verifier judge every program before any is attached.
pub fn load(object: &mut Ebpf) -> Result<(), KernelError> {
    let socket_ops: &mut SockOps = program(object, SOCKET_OPS)?;
    socket_ops
        .load()
        .map_err(|error| refused(SOCKET_OPS, error))?;
    for (name, _) in ADDRESS_HOOKS {
        let program: &mut CgroupSockAddr = program(object, name)?;
        program.load().map_err(|error| refused(name, error))?;
    }
    Ok(())
}

/// Attaches what [`load`] has loaded.
pub fn attach(
    object: &mut Ebpf,
    settings: &KernelSettings,
    attempt: &mut Attempt<'_>,
    pins: &Pins,
) -> Result<(), KernelError> {
    let path = &settings.cgroup_root;
    let cgroup = File::open(path).map_err(pins::failed("open cgroup", path))?;
    let id = cgroup
        .metadata()
        .map_err(pins::failed("examine cgroup", path))?
        .ino();
    let place = Place {
        settings,
        cgroup,
        id,
    };
    let socket_ops: &mut SockOps = program(object, SOCKET_OPS)?;
    place.attach(SOCKET_OPS, BPF_CGROUP_SOCK_OPS, socket_ops, attempt, pins)?;
    for (name, hook) in ADDRESS_HOOKS {
        let program: &mut CgroupSockAddr = program(object, name)?;
        place.attach(name, hook, program, attempt, pins)?;
    }
    Ok(())
}

struct Place<'a> {
    settings: &'a KernelSettings,
    cgroup: File,
    id: u64,
}

impl Place<'_> {
    fn attach(
        &self,
        name: &'static str,
        hook: bpf_attach_type,
        program: &mut impl CgroupProgram,
        attempt: &mut Attempt<'_>,
        pins: &Pins,
    ) -> Result<(), KernelError> {
        let fd = program.descriptor().map_err(|error| refused(name, error))?;
        if attempt.replace_program(name, self.id, fd) {
            return Ok(());
        }
        let target = self.settings.cgroup_root.display().to_string();
        let link = program.link(&self.cgroup).map_err(|error| {
            neighbours::holder(self.settings, name, hook as u32)
                .unwrap_or_else(|| not_attached(name, &target, &error))
        })?;
        let path = pins.link(name);
        // A pin that could not be adopted names something that is gone.
        Pins::remove(&path).map_err(pins::failed("unpin", &path))?;
        link.pin(&path)
            .map_err(|error| not_attached(name, &path.display().to_string(), &error))?;
        attempt.pinned(path);
        Ok(())
    }
}

/// What the two kinds of programs have in common.
trait CgroupProgram {
    fn descriptor(&self) -> Result<&ProgramFd, ProgramError>;
    fn link(&mut self, cgroup: &File) -> Result<FdLink, LinkFailure>;
}

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
enum LinkFailure {
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Link(#[from] LinkError),
}

macro_rules! cgroup_program {
    ($kind:ty) => {
        impl CgroupProgram for $kind {
            fn descriptor(&self) -> Result<&ProgramFd, ProgramError> {
                self.fd()
            }

            fn link(&mut self, cgroup: &File) -> Result<FdLink, LinkFailure> {
                // With a link the kernel lets others attach as well, whatever the mode.
                let id = self.attach(cgroup, CgroupAttachMode::Single)?;
                Ok(self.take_link(id)?.try_into()?)
            }
        }
    };
}

cgroup_program!(SockOps);
cgroup_program!(CgroupSockAddr);
