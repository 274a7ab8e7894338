//! What the kernel part is told, seen through maps of memory that may be full or fail.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
};

use culvert_abi::SlotKey;
use proptest::prelude::*;

use super::*;
use crate::{
    kernel::socket_address,
    mesh::{Health, IpFamilies, LoadBalancer, MeshDefaults, MeshResources, PortMap, WorkloadSpec},
};

/// Maps of memory, with the checks that the kernel part relies on.
#[derive(Default)]
struct Fake {
    services: RefCell<HashMap<ServiceKey, (u64, u32, u32)>>,
    slots: RefCell<HashMap<SlotKey, Slot>>,
    room: Cell<u32>,
    next: Cell<u64>,
    puts: Cell<u32>,
    fails: Cell<bool>,
}

impl Fake {
    fn failure() -> KernelError {
        KernelError::Map {
            map: "SERVICES",
            detail: "for the test".to_owned(),
        }
    }
}

fn slot_key(table: u64, slot: u32) -> SlotKey {
    SlotKey {
        table,
        slot,
        padding: 0,
    }
}

impl ServiceMaps for Rc<Fake> {
    fn room(&self) -> u32 {
        self.room.get()
    }

    fn put(
        &self,
        key: &ServiceKey,
        number: u32,
        slots: &[Slot],
    ) -> Result<Option<SlotTable>, KernelError> {
        if self.fails.get() {
            return Err(Fake::failure());
        }
        let mut map = self.slots.borrow_mut();
        let count = u32::try_from(slots.len()).unwrap();
        assert!(
            map.len() + slots.len() <= self.room.get() as usize,
            "no more than there is room for is ever written"
        );
        self.next.set(self.next.get() + 1);
        self.puts.set(self.puts.get() + 1);
        let table = SlotTable {
            id: self.next.get(),
            slots: count,
        };
        for (slot, at) in slots.iter().zip(0..) {
            map.insert(slot_key(table.id, at), *slot);
        }
        self.services
            .borrow_mut()
            .insert(*key, (table.id, count, number));
        Ok(Some(table))
    }

    fn remove(&self, key: &ServiceKey) -> Result<(), KernelError> {
        if self.fails.get() {
            return Err(Fake::failure());
        }
        assert!(self.services.borrow_mut().remove(key).is_some());
        Ok(())
    }

    fn delete(&self, table: &SlotTable) -> Result<(), KernelError> {
        if self.fails.get() {
            return Err(Fake::failure());
        }
        let services = self.services.borrow();
        assert!(
            services.values().all(|(id, _, _)| *id != table.id),
            "a service points at a table that is deleted"
        );
        for at in 0..table.slots {
            let slot = self.slots.borrow_mut().remove(&slot_key(table.id, at));
            assert!(slot.is_some());
        }
        Ok(())
    }
}

struct Stage {
    fake: Rc<Fake>,
    services: Services<Rc<Fake>>,
}

impl Stage {
    fn new() -> Self {
        let fake = Rc::new(Fake::default());
        fake.room.set(1000);
        Self {
            services: Services::new(Rc::clone(&fake), "".into()),
            fake,
        }
    }

    /// Syncs with a mesh, and the pods of it that are here; the number of a pod is its place among them.
    fn sync(&mut self, mesh: &Mesh, here: &[&str]) -> Result<(), KernelError> {
        self.services.sync(mesh, &members(mesh, here))
    }

    fn clean(&mut self) -> bool {
        let retired = self.services.take_retired();
        self.services.delete(retired).unwrap()
    }

    /// `view address -> endpoint address (workload number)...` of every service, all slots in order.
    fn told(&self) -> BTreeMap<String, Vec<String>> {
        let slots = self.fake.slots.borrow();
        let services = self.fake.services.borrow();
        services
            .iter()
            .map(|(key, (table, count, number))| {
                let name = self.services.name(*number).unwrap();
                let at = socket_address(key.address, key.port);
                let shown = (0..*count).map(|at| {
                    let slot = slots[&slot_key(*table, at)];
                    assert!(slot.alias < *count);
                    let to = socket_address(slot.address, slot.port);
                    format!("{to} ({})", slot.workload)
                });
                (format!("{} {name} {at}", key.view), shown.collect())
            })
            .collect()
    }

    /// Every slot belongs to a table that a service points at.
    fn assert_tidy(&self) {
        let counted: u32 = self.fake.services.borrow().values().map(|one| one.1).sum();
        assert_eq!(self.fake.slots.borrow().len(), counted as usize);
        assert_eq!(self.services.used, counted);
    }
}

fn members(mesh: &Mesh, here: &[&str]) -> Vec<Member> {
    let members = here.iter().zip(1..).map(|(uid, number)| {
        let workload = mesh.workload_by_uid(uid).unwrap();
        Member {
            workload: workload.clone(),
            endpoints: workload.addresses.iter().map(|ip| (*ip, number)).collect(),
        }
    });
    members.collect()
}

fn workload(uid: &str, ip: &str, services: &[&str]) -> WorkloadSpec {
    let services = services
        .iter()
        .map(|name| (name.parse().unwrap(), PortMap::default()));
    WorkloadSpec {
        uid: uid.into(),
        name: uid.into(),
        namespace: "ns".into(),
        addresses: vec![ip.parse().unwrap()],
        services: services.collect(),
        ..WorkloadSpec::default()
    }
}

fn service(id: &str, vip: &str) -> Service {
    Service {
        id: id.parse().unwrap(),
        name: id.into(),
        vips: vec![vip.parse().unwrap()],
        ports: [(80, 8080)].into_iter().collect(),
        subject_alt_names: vec![],
        waypoints: Vec::new(),
        load_balancer: LoadBalancer::default(),
        ip_families: IpFamilies::default(),
        canonical: false,
    }
}

fn build(services: Vec<Service>, workloads: Vec<WorkloadSpec>) -> Mesh {
    let resources = MeshResources {
        workloads,
        services,
        ..MeshResources::default()
    };
    Mesh::build(resources, &MeshDefaults::default()).unwrap()
}

/// A service with an endpoint here and one elsewhere, and a service that has none here.
fn two_services(more: Vec<WorkloadSpec>) -> Mesh {
    let mut workloads = vec![
        workload("client", "10.0.0.9", &[]),
        workload("near", "10.0.0.1", &["ns/h"]),
        workload("far", "10.0.0.2", &["ns/h", "ns/far"]),
    ];
    workloads.extend(more);
    build(
        vec![
            service("ns/h", "/10.96.0.1"),
            service("ns/far", "/10.96.0.2"),
        ],
        workloads,
    )
}

fn assert_told(stage: &Stage, expected: &[(&str, &[&str])]) {
    let expected = expected.iter().map(|(service, slots)| {
        let slots = slots.iter().map(ToString::to_string).collect();
        ((*service).to_owned(), slots)
    });
    assert_eq!(stage.told(), expected.collect());
}

#[test]
fn only_services_with_an_endpoint_here_are_told() {
    let mut stage = Stage::new();
    let mesh = two_services(vec![]);
    stage.sync(&mesh, &["client"]).unwrap();
    assert_told(&stage, &[]);
    stage.sync(&mesh, &["client", "near"]).unwrap();
    let both = [(
        "1 ns/h 10.96.0.1:80",
        &["10.0.0.1:8080 (2)", "10.0.0.2:8080 (0)"][..],
    )];
    assert_told(&stage, &both);
    stage.sync(&mesh, &["client"]).unwrap();
    assert_told(&stage, &[]);
    stage.clean();
    stage.assert_tidy();
}

#[test]
fn nothing_is_written_when_nothing_has_changed() {
    let mut stage = Stage::new();
    let mesh = two_services(vec![]);
    stage.sync(&mesh, &["client", "near"]).unwrap();
    assert_eq!(stage.fake.puts.get(), 1);
    // What does not concern this node either.
    let more = two_services(vec![workload("other", "10.0.0.3", &["ns/far"])]);
    stage.sync(&more, &["client", "near"]).unwrap();
    assert_eq!(stage.fake.puts.get(), 1);
    assert!(stage.services.take_retired().is_empty());
}

#[test]
fn a_change_is_a_new_table_and_the_old_one_stays_until_it_is_deleted() {
    let mut stage = Stage::new();
    stage.sync(&two_services(vec![]), &["near"]).unwrap();
    let more = two_services(vec![workload("third", "10.0.0.3", &["ns/h"])]);
    stage.sync(&more, &["near"]).unwrap();
    assert_eq!(stage.fake.slots.borrow().len(), 5);
    stage.clean();
    assert_eq!(stage.fake.slots.borrow().len(), 3);
    stage.assert_tidy();
}

#[test]
fn an_endpoint_that_is_another_pod_by_now_has_no_number() {
    let mut stage = Stage::new();
    let mesh = two_services(vec![]);
    // The client's pod has come to the address that the mesh still gives to `far`.
    let mut pods = members(&mesh, &["client", "near"]);
    pods[0].endpoints.push(("10.0.0.2".parse().unwrap(), 1));
    stage.services.sync(&mesh, &pods).unwrap();
    let both = [(
        "1 ns/h 10.96.0.1:80",
        &["10.0.0.1:8080 (2)", "10.0.0.2:8080 (0)"][..],
    )];
    assert_told(&stage, &both);
    // One that the kernel part has no number for is not an endpoint here.
    let mut pods = members(&mesh, &["near"]);
    pods[0].endpoints[0].1 = 0;
    stage.services.sync(&mesh, &pods).unwrap();
    assert_told(&stage, &[]);
}

#[test]
fn an_unhealthy_endpoint_has_no_slot() {
    let mut ill = workload("ill", "10.0.0.3", &["ns/h"]);
    ill.status = Health::Unhealthy;
    let mut stage = Stage::new();
    stage
        .sync(&two_services(vec![ill]), &["near", "ill"])
        .unwrap();
    let both = [(
        "1 ns/h 10.96.0.1:80",
        &["10.0.0.1:8080 (1)", "10.0.0.2:8080 (0)"][..],
    )];
    assert_told(&stage, &both);
}

#[test]
fn pods_that_see_services_alike_share_a_view() {
    let mut stage = Stage::new();
    let mut other = workload("other", "10.0.0.8", &[]);
    other.locality.region = "far".into();
    let mut six = workload("six", "fd00::8", &[]);
    six.namespace = "another".into();
    let mesh = two_services(vec![other, six]);
    let view = |stage: &mut Stage, uid| {
        let workload = mesh.workload_by_uid(uid).unwrap();
        stage.services.view_of(Some(workload))
    };
    let views = ["client", "near", "other", "six"].map(|uid| view(&mut stage, uid));
    assert_eq!(views, [1, 1, 2, 3]);
    assert_eq!(stage.services.view_of(None), 0);
    stage
        .sync(&mesh, &["client", "near", "other", "six"])
        .unwrap();
    let told: Vec<_> = stage.told().into_keys().collect();
    assert_eq!(
        told,
        [
            "1 ns/h 10.96.0.1:80",
            "2 ns/h 10.96.0.1:80",
            "3 ns/h 10.96.0.1:80"
        ]
    );
    // Nobody has the second one any more, and its number is not used again.
    stage.sync(&mesh, &["client", "near", "six"]).unwrap();
    assert_eq!(stage.told().len(), 2);
    assert_eq!(view(&mut stage, "other"), 4);
}

#[test]
fn what_finds_no_room_is_left_out_whole_until_there_is_some() {
    let mut stage = Stage::new();
    stage.fake.room.set(3);
    let mesh = two_services(vec![workload("both", "10.0.0.3", &["ns/far"])]);
    stage.sync(&mesh, &["near", "both"]).unwrap();
    // In the order of their names: `ns/far` has two endpoints, and then `ns/h` does not fit.
    let far = [(
        "1 ns/far 10.96.0.2:80",
        &["10.0.0.2:8080 (0)", "10.0.0.3:8080 (2)"][..],
    )];
    assert_told(&stage, &far);
    assert!(stage.services.warned);
    // Without `both`, `ns/far` has no endpoint here; `ns/h` finds room once the old table is deleted.
    stage.sync(&mesh, &["near"]).unwrap();
    assert_told(&stage, &[]);
    assert!(stage.clean(), "it asks for another try");
    stage.sync(&mesh, &["near"]).unwrap();
    assert_eq!(stage.told().len(), 1);
    assert!(!stage.clean());
    stage.assert_tidy();
}

#[test]
fn what_fails_is_tried_again_by_the_next() {
    let mut stage = Stage::new();
    let mesh = two_services(vec![]);
    stage.fake.fails.set(true);
    assert!(stage.sync(&mesh, &["near"]).is_err());
    stage.fake.fails.set(false);
    stage.sync(&mesh, &["near"]).unwrap();
    assert_eq!(stage.told().len(), 1);
    stage.fake.fails.set(true);
    assert!(stage.sync(&mesh, &["client"]).is_err());
    stage.fake.fails.set(false);
    stage.sync(&mesh, &["client"]).unwrap();
    assert_told(&stage, &[]);
    stage.fake.fails.set(true);
    let retired = stage.services.take_retired();
    assert!(stage.services.delete(retired).is_err());
    stage.fake.fails.set(false);
    stage.clean();
    stage.assert_tidy();
}

#[test]
fn a_service_keeps_its_number_while_it_is_in_the_mesh() {
    let mut stage = Stage::new();
    let mesh = two_services(vec![]);
    stage.sync(&mesh, &["near"]).unwrap();
    stage.sync(&mesh, &[]).unwrap();
    assert_eq!(stage.services.name(1).unwrap().as_str(), "ns/h");
    stage.sync(&build(vec![], vec![]), &[]).unwrap();
    assert!(stage.services.name(1).is_none());
}

#[test]
fn a_large_mesh_costs_only_what_concerns_the_pods_here() {
    let names: Vec<String> = (0..5000).map(|i| format!("ns/s{i}")).collect();
    let services = names.iter().enumerate().map(|(i, name)| {
        let vip = format!("/10.96.{}.{}", i / 256, i % 256);
        service(name, &vip)
    });
    let uids: Vec<String> = (0..10_000).map(|i| format!("w{i}")).collect();
    let workloads = uids.iter().enumerate().map(|(i, uid)| {
        let ip = format!("10.1.{}.{}", i / 256, i % 256);
        workload(uid, &ip, &[&names[i % 5000]])
    });
    let mesh = build(services.collect(), workloads.collect());
    let here: Vec<&str> = uids.iter().take(100).map(String::as_str).collect();
    let mut stage = Stage::new();
    stage.sync(&mesh, &here).unwrap();
    assert_eq!(stage.told().len(), 100);
    let began = std::time::Instant::now();
    stage.sync(&mesh, &here).unwrap();
    println!("nothing has changed: {:?}", began.elapsed());
    assert_eq!(stage.fake.puts.get(), 100);
}

proptest! {
    /// Whatever comes and goes, in whatever order: what is told is what a fresh start would tell.
    #[test]
    fn changes_lead_where_a_fresh_start_would(
        steps in prop::collection::vec((any::<u8>(), any::<u8>(), any::<bool>()), 1..12),
    ) {
        let mut stage = Stage::new();
        for (ready, placed, clean) in steps {
            let uids: Vec<String> = (0..8).map(|i| format!("w{i}")).collect();
            let workloads = uids.iter().enumerate().map(|(i, uid)| WorkloadSpec {
                status: if ready >> i & 1 == 1 { Health::Healthy } else { Health::Unhealthy },
                capacity: Some(1 + u32::from(ready) * i as u32),
                ..workload(uid, &format!("10.0.0.{}", i + 1), &[["ns/a", "ns/b"][i % 2]])
            });
            let services = vec![service("ns/a", "/10.96.0.1"), service("ns/b", "/10.96.0.2")];
            let mesh = build(services, workloads.collect());
            let here = uids.iter().enumerate().filter(|(i, _)| placed >> i & 1 == 1);
            let here: Vec<&str> = here.map(|(_, uid)| uid.as_str()).collect();
            stage.sync(&mesh, &here).unwrap();
            if clean {
                stage.clean();
                stage.assert_tidy();
            }
            let mut fresh = Stage::new();
            fresh.sync(&mesh, &here).unwrap();
            let without_views = |told: BTreeMap<String, Vec<String>>| -> Vec<_> {
                let strip = |name: String| name.split_once(' ').unwrap().1.to_owned();
                told.into_iter().map(|(name, slots)| (strip(name), slots)).collect()
            };
            prop_assert_eq!(without_views(stage.told()), without_views(fresh.told()));
        }
    }
}
