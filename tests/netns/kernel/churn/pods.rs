//! Pods that come and go: at addresses that others had before, as other identities, under the names of earlier ones.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};
use culvert_harness::{Pod, PodOptions, Proc, Workload};
use culvert_tests::scene::{NAMESPACE, PORT};

use super::{
    Chance,
    load::{Expected, Load, Way},
    stage::{CLOSED, NODES, Stage, VIP_PORT, servers, settle},
};

/// Milliseconds between two connections of a pair.
const PACE: u64 = 100;
/// Each node has a place for half of them.
pub const SLOTS: usize = 4;
/// Addresses that they share: more than there are pods, so that nobody has to wait for one.
const ADDRESSES: u8 = 6;
/// The harness gives a node's pods no more names than that.
const MOST_BORN: u64 = 220;

/// Where a pod lives now and then.
#[derive(Default)]
pub struct Slot {
    life: Option<Life>,
    /// Of the one before.
    last: Option<(String, Ipv4Addr)>,
    born: u64,
}

struct Life {
    pod: Pod,
    workload: Workload,
    address: Ipv4Addr,
    /// Policy lets the client in.
    open: bool,
    loads: Vec<Load>,
    _server: Proc,
}

impl Slot {
    pub fn loads(&self) -> impl Iterator<Item = &Load> {
        self.life.iter().flat_map(|life| &life.loads)
    }

    /// The workload, if it may be an endpoint of a service that the client uses.
    pub fn endpoint(&self) -> Option<&str> {
        let life = self.life.as_ref().filter(|life| life.open)?;
        Some(&life.workload.name)
    }
}

impl Stage {
    /// Whatever is in this slot changes.
    pub fn live_or_die(&mut self, place: usize, chance: &mut Chance) -> Result<()> {
        match self.slots[place].life.is_some() {
            true => self.die(place, chance),
            false if self.slots[place].born < MOST_BORN => self.be_born(place, chance),
            false => Ok(()),
        }
    }

    fn be_born(&mut self, place: usize, chance: &mut Chance) -> Result<()> {
        let node = place * NODES / SLOTS;
        let address = self.free_address(chance)?;
        let last = self.slots[place].last.take();
        let name = match &last {
            Some((name, _)) if chance.one_in(2) => name.clone(),
            _ => format!("life-{place}-{}", self.slots[place].born),
        };
        self.slots[place].born += 1;
        self.count(match &last {
            Some((before, at)) if *before == name && *at != address => {
                "a pod moves to another address"
            }
            _ => "a pod joins",
        });
        let options = PodOptions {
            address: Some(address),
            ..PodOptions::default()
        };
        let pod = self.node(node).pod_with(&name, options)?;
        let server = servers(&pod)?;
        let trusted = chance.one_in(2);
        let account = if trusted { "client" } else { "stranger" };
        if let Some(before) = self.owners.insert(address, account)
            && before != account
        {
            self.count("an address goes to another identity");
        }
        let mut workload = Workload::of_pod(&pod, NAMESPACE, account);
        let open = !chance.one_in(3);
        if !open {
            workload.authorization_policies = vec![format!("{NAMESPACE}/{CLOSED}")];
        }
        // istio-cni and istiod tell of a pod in any order.
        let known_first = chance.one_in(2);
        let told = workload.clone();
        if known_first {
            self.scene.change_mesh(|mesh| mesh.workloads.push(told))?;
            self.agent(node).enrol_as(&pod, &workload)?;
        } else {
            self.agent(node).enrol_as(&pod, &workload)?;
            self.scene.change_mesh(|mesh| mesh.workloads.push(told))?;
        }
        settle();
        let loads = self.loads_of(&pod, node, trusted, open)?;
        self.slots[place].life = Some(Life {
            pod,
            workload,
            address,
            open,
            loads,
            _server: server,
        });
        Ok(())
    }

    fn loads_of(&self, pod: &Pod, node: usize, trusted: bool, open: bool) -> Result<Vec<Load>> {
        let scene = &self.scene;
        let (near, far) = match node {
            0 => (&scene.server_a, scene.server_b()?),
            _ => (scene.server_b()?, &scene.server_a),
        };
        let from_first = match node {
            0 => Way::Direct(0),
            _ => Way::Tunnel,
        };
        let own = Expected::allow_if(trusted);
        let to = pod.at(PORT);
        Ok(vec![
            Load::start(Way::Direct(node), pod, &near.at(PORT), PACE, own)?,
            Load::start(Way::Tunnel, pod, &far.at_v6(PORT)?, PACE, own)?,
            Load::start(
                from_first,
                &scene.client,
                &to,
                PACE,
                Expected::allow_if(open),
            )?,
            Load::start(from_first, &scene.intruder, &to, PACE, Expected::Deny)?,
        ])
    }

    fn die(&mut self, place: usize, chance: &mut Chance) -> Result<()> {
        let Some(life) = self.slots[place].life.take() else {
            return Ok(());
        };
        self.count("a pod leaves");
        for load in life.loads {
            load.end(&mut self.totals)?;
        }
        let (name, uid) = (life.workload.name, life.workload.uid);
        let node = place * NODES / SLOTS;
        let is_endpoint = |stage: &mut Self| {
            let workload = stage.scene.mesh.workload(&name);
            workload.is_some_and(|workload| !workload.services.is_empty())
        };
        if is_endpoint(self) {
            self.set_endpoint(&name, false)?;
            settle();
        }
        let forget = |stage: &mut Self| {
            let uid = uid.clone();
            stage
                .scene
                .change_mesh(|mesh| mesh.workloads.retain(|workload| workload.uid != uid))
        };
        // The agent hears of it before, between and after.
        match chance.below(3) {
            0 => {
                self.agent(node).unenrol(&uid)?;
                life.pod.remove()?;
                forget(self)?;
            }
            1 => {
                forget(self)?;
                self.agent(node).unenrol(&uid)?;
                life.pod.remove()?;
            }
            _ => {
                life.pod.remove()?;
                forget(self)?;
                self.agent(node).unenrol(&uid)?;
            }
        }
        self.slots[place].last = Some((name, life.address));
        Ok(())
    }

    /// Everybody leaves.
    pub fn empty(&mut self) -> Result<()> {
        let mut chance = Chance(0);
        (0..SLOTS).try_for_each(|place| self.die(place, &mut chance))
    }

    fn free_address(&self, chance: &mut Chance) -> Result<Ipv4Addr> {
        let taken = |address: &Ipv4Addr| {
            let lives = self.slots.iter().filter_map(|slot| slot.life.as_ref());
            lives.into_iter().any(|life| life.address == *address)
        };
        let all = (1..=ADDRESSES).map(|host| Ipv4Addr::new(10, 77, 200, host));
        let free: Vec<_> = all.filter(|address| !taken(address)).collect();
        let chosen = free.get(chance.below(free.len().max(1))).copied();
        chosen.context("more pods than addresses")
    }

    /// Makes a workload an endpoint of the service, or no more.
    pub fn set_endpoint(&mut self, name: &str, serves: bool) -> Result<()> {
        self.count(match serves {
            true => "an endpoint is added to a service",
            false => "an endpoint is taken from a service",
        });
        let service = super::stage::service();
        self.scene.change_mesh(|mesh| {
            if let Some(workload) = mesh.workload(name) {
                workload.services.clear();
                if serves {
                    *workload = workload.clone().serves(&service, VIP_PORT, PORT);
                }
            }
        })
    }
}
