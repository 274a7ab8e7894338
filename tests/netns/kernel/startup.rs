//! Where the agent cannot do its work it says what it needs, and ends.

use std::{fs, os::unix::fs::PermissionsExt as _};

use anyhow::{Context as _, Result};
use culvert_abi::LAYOUT_VERSION;
use culvert_harness::{
    Agent, AgentOptions, Fabric, Foreign, Hook, Mesh, Node, culvert_binary, log::Stream,
};
use culvert_tests::scene::{NAMESPACE, SOON, Scene, answered, connect};

use crate::{enrolment::network, kernel_tables::pinned, owner::attached_to};

/// What the agent says that does not start with these options.
pub fn complaint(node: &Node, options: AgentOptions) -> Result<String> {
    let agent = node.start_agent(options)?;
    let status = agent.process().wait(SOON)?;
    assert!(status.code().is_some_and(|code| code != 0), "{status}");
    Ok(agent.log().text(Stream::Err))
}

fn stage() -> Result<(Fabric, Node)> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    Mesh::default().write(&Agent::default_mesh_file(&node))?;
    Ok((fabric, node))
}

#[test]
fn pins_that_are_not_on_a_bpf_file_system_are_refused() -> Result<()> {
    let (fabric, node) = stage()?;
    let pin_dir = fabric.directory().join("pins");
    let said = complaint(
        &node,
        AgentOptions {
            pin_dir: Some(pin_dir.clone()),
            ..AgentOptions::default()
        },
    )?;
    for part in [
        pin_dir.to_str().unwrap(),
        "BPF file system",
        "mount -t bpf",
        "CULVERT_PIN_DIR",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    Ok(())
}

#[test]
fn a_cgroup_root_that_is_no_cgroup_is_refused() -> Result<()> {
    let (fabric, node) = stage()?;
    let cgroup_root = Some(fabric.directory().to_owned());
    let said = complaint(
        &node,
        AgentOptions {
            cgroup_root,
            ..AgentOptions::default()
        },
    )?;
    for part in [
        fabric.directory().to_str().unwrap(),
        "cgroup v2",
        "CULVERT_CGROUP_ROOT",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    Ok(())
}

#[test]
fn an_agent_outside_its_cgroup_root_is_refused() -> Result<()> {
    let (_fabric, node) = stage()?;
    let cgroup_root = Some(node.pods_cgroup().path().to_owned());
    let said = complaint(
        &node,
        AgentOptions {
            cgroup_root,
            ..AgentOptions::default()
        },
    )?;
    for part in [
        "does not run inside",
        "CULVERT_CGROUP_ROOT",
        "start it in a cgroup below",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    Ok(())
}

#[test]
fn pinned_maps_of_another_layout_are_not_adopted() -> Result<()> {
    let scene = Scene::new()?;
    scene.agent1.kill()?;
    std::fs::remove_file(pinned(&scene.node1, "VERDICTS"))?;
    std::fs::rename(
        pinned(&scene.node1, "FLOWS"),
        pinned(&scene.node1, "VERDICTS"),
    )?;
    let said = complaint(&scene.node1, AgentOptions::default())?;
    for part in ["map VERDICTS", "another type or size", "culvert unload"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    Ok(())
}

#[test]
fn a_hook_that_somebody_holds_alone_is_named_and_nothing_stays_behind() -> Result<()> {
    let (_fabric, node) = stage()?;
    let own = node.cgroup().path().to_owned();
    let above = own.parent().context("a cgroup above")?.to_owned();
    let foreign = [Hook::Connect4, Hook::SocketOps];
    for (hook, name) in foreign.into_iter().zip(["connect4", "socket_ops"]) {
        let foreign = Foreign::load(hook)?;
        for place in [&own, &above] {
            let held = foreign.attach_alone(place)?;
            let said = complaint(&node, AgentOptions::default())?;
            let place = place.to_str().unwrap();
            for part in [
                format!("cannot attach `{name}`").as_str(),
                "`foreign`",
                &format!("for itself alone at {place},"),
                "BPF_F_ALLOW_MULTI",
                "CULVERT_CGROUP_ROOT",
            ] {
                assert!(said.contains(part), "{part}: {said}");
            }
            drop(held);
            assert!(attached_to(&own)?.is_empty());
            assert!(!node.pin_directory().exists());
        }
    }
    node.start_agent(AgentOptions::default())?.ready()
}

#[test]
fn an_agent_that_may_not_attach_leaves_what_it_adopted_as_it_was() -> Result<()> {
    let scene = Scene::new()?;
    let cgroup = scene.node1.cgroup().path();
    scene.agent1.kill()?;
    // One hook is lost, and somebody holds it now.
    fs::remove_file(pinned_link(&scene.node1, "connect6"))?;
    let before = culvert_harness::wait_until(SOON, "the hook to be gone", || {
        let left = attached_to(cgroup)?;
        Ok((left.len() == 4).then_some(left))
    })?;
    let foreign = Foreign::load(Hook::Connect6)?;
    // A link's id goes before the link itself does.
    let held = culvert_harness::wait_until(SOON, "the hook to be free", || {
        Ok(foreign.attach_alone(cgroup).ok())
    })?;
    let said = complaint(&scene.node1, AgentOptions::default())?;
    assert!(said.contains("cannot attach `connect6`"), "{said}");
    let mut after = attached_to(cgroup)?;
    after.retain(|link| before.iter().any(|before| before.link == link.link));
    assert_eq!(after, before, "the programs of before are back");
    assert!(pinned(&scene.node1, "FLOWS").exists());
    drop(held);
    scene.node1.start_agent(AgentOptions::default())?.ready()
}

fn pinned_link(node: &Node, name: &str) -> std::path::PathBuf {
    let root = node.pin_directory().join(format!("v{LAYOUT_VERSION}"));
    root.join("links").join(name)
}

#[test]
fn a_pod_whose_lookups_are_full_is_not_enrolled_and_stays_as_it_was() -> Result<()> {
    let scene = Scene::new()?;
    let (guest, outsider) = (scene.node1.pod("guest")?, scene.node1.pod("outsider")?);
    let _server = culvert_tests::scene::serve(&guest, "echo")?;
    let before = network(&guest)?;
    let foreign = Foreign::load(Hook::SkLookup)?;
    // As many as the kernel takes.
    let held: Vec<_> = (0..64)
        .map(|_| foreign.link(guest.netns()))
        .collect::<Result<_>>()?;
    let enrolled = scene
        .agent1
        .enrol(&guest, "guest-uid", NAMESPACE, "guest", "guest");
    let said = format!("{:#}", enrolled.unwrap_err());
    let cookie = guest.netns().cookie()?.to_string();
    for part in ["`inbound`", &cookie, "detach some"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(network(&guest)?, before);
    let hello = ["--send", "hello", "--read", "5"];
    assert!(answered(&connect(&outsider, &guest, &hello)?));
    drop(held);
    scene
        .agent1
        .enrol(&guest, "guest-uid", NAMESPACE, "guest", "guest")
}

#[test]
fn pins_of_another_layout_are_refused_until_they_are_unloaded() -> Result<()> {
    for version in ["1", "99"] {
        let scene = Scene::new()?;
        scene.agent1.kill()?;
        // Another version's pins: real ones, under its name.
        let pins = scene.node1.pin_directory();
        let own = pins.join(format!("v{LAYOUT_VERSION}"));
        let other = pins.join(format!("v{version}"));
        for part in ["maps", "links", "pods"] {
            fs::create_dir_all(other.join(part))?;
            for entry in fs::read_dir(own.join(part))? {
                let entry = entry?;
                fs::rename(entry.path(), other.join(part).join(entry.file_name()))?;
            }
        }
        let said = complaint(&scene.node1, AgentOptions::default())?;
        let mend = format!("culvert unload --pin-dir {}", pins.display());
        for part in [
            format!("layout {version}").as_str(),
            &format!("this version has {LAYOUT_VERSION}"),
            &mend,
            "nothing revokes them",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert!(!attached_to(scene.node1.cgroup().path())?.is_empty());
        let unload = scene.node1.command(culvert_binary()?);
        unload.args(mend.split(' ').skip(1)).run(SOON)?.success()?;
        assert!(attached_to(scene.node1.cgroup().path())?.is_empty());
        let agent = scene.node1.start_agent(AgentOptions::default())?;
        agent.ready()?;
    }
    Ok(())
}

/// An agent in a mount namespace where one file system is covered by an empty one.
fn without(node: &Node, covered: &str) -> Result<String> {
    let script = node.directory().join("covered.sh");
    let text = format!(
        "#!/bin/sh\nexec unshare --mount sh -c 'mount -t tmpfs none {covered} && exec \"$0\" \"$@\"' {} \"$@\"\n",
        culvert_binary()?.display()
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    complaint(
        node,
        AgentOptions {
            binary: Some(script),
            // It would be missed first: it is in the cgroup file system as well.
            env: [("CULVERT_PASS_NODE_PROBES".to_owned(), "false".to_owned())].into(),
            ..AgentOptions::default()
        },
    )
}

#[test]
fn a_kernel_without_type_information_is_named() -> Result<()> {
    let (_fabric, node) = stage()?;
    let said = without(&node, "/sys/kernel/btf")?;
    for part in ["/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!node.pin_directory().exists());
    Ok(())
}

#[test]
fn a_machine_without_bpf_file_system_is_named() -> Result<()> {
    let (_fabric, node) = stage()?;
    let said = without(&node, "/sys/fs/bpf")?;
    for part in ["BPF file system", "mount -t bpf", "CULVERT_PIN_DIR"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    Ok(())
}

#[test]
fn a_machine_without_cgroup_v2_is_named() -> Result<()> {
    let (_fabric, node) = stage()?;
    let mount = culvert_harness::cgroup::root()?;
    let said = without(&node, mount.to_str().unwrap())?;
    for part in ["cgroup v2", "CULVERT_CGROUP_ROOT"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!node.pin_directory().exists());
    Ok(())
}
