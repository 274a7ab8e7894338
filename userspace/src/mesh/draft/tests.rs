use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::super::{NamespaceAnnotations, NetworkCidr, PortMap, ServiceName, TunnelProtocol};
use super::*;
use crate::policy::{Action, Scope};

fn pod(uid: u8, ips: &[u8], services: &[u8]) -> WorkloadSpec {
    WorkloadSpec {
        uid: format!("uid-{uid}").into(),
        name: format!("name-{}", uid / 2).into(),
        namespace: "ns".into(),
        addresses: ips.iter().map(|ip| address(*ip)).collect(),
        protocol: TunnelProtocol::Hbone,
        workload_name: "deployment".into(),
        services: services
            .iter()
            .map(|number| (service_name(*number), PortMap::default()))
            .collect(),
        ..WorkloadSpec::default()
    }
}

fn address(number: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, number])
}

fn service_name(number: u8) -> ServiceName {
    ServiceName::new("ns", &format!("host-{number}")).unwrap()
}

fn service(number: u8, vips: &[u8]) -> Service {
    let vip = |vip: &u8| match vip % 2 {
        0 => format!("/10.96.0.{vip}").parse::<NetworkCidr>().unwrap(),
        _ => format!("/10.{vip}.0.0/16").parse().unwrap(),
    };
    Service {
        id: service_name(number),
        name: format!("host-{number}").into(),
        vips: vips.iter().map(vip).collect(),
        ports: PortMap::default(),
        subject_alt_names: Vec::new(),
        waypoints: Vec::new(),
        load_balancer: Default::default(),
        ip_families: Default::default(),
        canonical: false,
    }
}

fn policy(number: u8, scope: Scope) -> Authorization {
    Authorization {
        name: policy_name(number),
        scope,
        action: Action::Deny,
        dry_run: false,
        rules: Vec::new(),
    }
}

fn policy_name(number: u8) -> PolicyName {
    PolicyName::new("ns", &format!("policy-{number}")).unwrap()
}

#[derive(Debug, Clone)]
enum Change {
    Workload(u8, Vec<u8>, Vec<u8>),
    NoWorkload(u8),
    Service(u8, Vec<u8>),
    NoService(u8),
    Policy(u8, Scope),
    NoPolicy(u8),
}

fn change() -> impl Strategy<Value = Change> {
    let some = || prop::collection::vec(0u8..4, 0..3);
    let scope = prop::sample::select(vec![
        Scope::Global,
        Scope::Namespace,
        Scope::WorkloadSelector,
    ]);
    prop_oneof![
        (0u8..5, some(), some())
            .prop_map(|(uid, ips, services)| Change::Workload(uid, ips, services)),
        (0u8..5).prop_map(Change::NoWorkload),
        (0u8..4, some()).prop_map(|(number, vips)| Change::Service(number, vips)),
        (0u8..4).prop_map(Change::NoService),
        (0u8..4, scope).prop_map(|(number, scope)| Change::Policy(number, scope)),
        (0u8..4).prop_map(Change::NoPolicy),
    ]
}

fn apply(draft: &mut Draft<'_>, change: &Change) {
    match change {
        Change::Workload(uid, ips, services) => {
            draft.put_workload(pod(*uid, ips, services)).unwrap();
        }
        Change::NoWorkload(uid) => {
            draft.remove_workload(&format!("uid-{uid}"));
        }
        Change::Service(number, vips) => draft.put_service(service(*number, vips)),
        Change::NoService(number) => {
            draft.remove_service(service_name(*number).as_str());
        }
        Change::Policy(number, scope) => draft.put_policy(policy(*number, *scope)),
        Change::NoPolicy(number) => {
            draft.remove_policy(&policy_name(*number));
        }
    }
}

/// What each resource was made last, in that order.
fn survivors(changes: &[Change]) -> Vec<Change> {
    let mut last = BTreeMap::new();
    for (place, change) in changes.iter().enumerate() {
        let key = match change {
            Change::Workload(uid, ..) | Change::NoWorkload(uid) => (0, *uid),
            Change::Service(number, _) | Change::NoService(number) => (1, *number),
            Change::Policy(number, _) | Change::NoPolicy(number) => (2, *number),
        };
        last.insert(key, place);
    }
    let places: BTreeSet<_> = last.into_values().collect();
    places.into_iter().map(|at| changes[at].clone()).collect()
}

/// Everything that can be asked of a mesh of these.
fn answers(mesh: &Mesh) -> Vec<String> {
    let mut said = Vec::new();
    for number in 0..=6 {
        said.push(format!("{:?}", mesh.lookup("", address(number), None)));
        for ip in [[10, 96, 0, number], [10, number, 3, 4]] {
            said.push(format!("{:?}", mesh.lookup("", IpAddr::from(ip), None)));
        }
        let mut named: Vec<_> = mesh
            .workloads_by_name("ns", &format!("name-{number}"))
            .to_vec();
        named.sort_by(|a, b| a.uid.cmp(&b.uid));
        said.push(format!("{named:?}"));
        let mut endpoints: Vec<_> = mesh
            .backends(&service_name(number))
            .iter()
            .map(|one| one.uid.clone())
            .collect();
        endpoints.sort();
        said.push(format!("{endpoints:?}"));
        if let Some(workload) = mesh.workload_by_uid(&format!("uid-{number}")) {
            said.push(format!("{:?}", mesh.policies_for(workload)));
        }
    }
    said.push(format!(
        "{} {} {}",
        mesh.workloads().len(),
        mesh.services().len(),
        mesh.policies().len()
    ));
    said
}

proptest! {
    #[test]
    fn a_changed_mesh_answers_as_one_made_anew(changes in prop::collection::vec(change(), 0..40)) {
        let (defaults, namespaces) = (MeshDefaults::default(), Namespaces::new());
    let mut shared = SharedTraits::default();
        let mut mesh = Mesh::default();
        for change in &changes {
            let before = answers(&mesh);
            let mut draft = Draft::of(&mesh, &defaults, &namespaces, &mut shared);
            apply(&mut draft, change);
            let next = draft.finish();
            prop_assert_eq!(&before, &answers(&mesh), "the old mesh changed");
            mesh = next;
        }
        let mut anew = Draft::of(&Mesh::default(), &defaults, &namespaces, &mut shared);
        for change in survivors(&changes) {
            apply(&mut anew, &change);
        }
        prop_assert_eq!(answers(&mesh), answers(&anew.finish()));
    }
}

#[test]
fn an_address_is_the_last_ones_and_goes_back_when_that_leaves() {
    let (defaults, namespaces) = (MeshDefaults::default(), Namespaces::new());
    let mut shared = SharedTraits::default();
    let mut draft = Draft::of(&Mesh::default(), &defaults, &namespaces, &mut shared);
    draft.put_workload(pod(1, &[7], &[])).unwrap();
    draft.put_workload(pod(2, &[7], &[])).unwrap();
    let both = draft.finish();
    assert_eq!(&*both.workload_by_ip("", address(7)).unwrap().uid, "uid-2");
    let mut draft = Draft::of(&both, &defaults, &namespaces, &mut shared);
    assert!(draft.remove_workload("uid-2"));
    let one = draft.finish();
    assert_eq!(&*one.workload_by_ip("", address(7)).unwrap().uid, "uid-1");
}

#[test]
fn who_shares_the_nodes_address_is_not_found_by_it() {
    let (defaults, namespaces) = (MeshDefaults::default(), Namespaces::new());
    let mut shared = SharedTraits::default();
    let mut draft = Draft::of(&Mesh::default(), &defaults, &namespaces, &mut shared);
    let spec = WorkloadSpec {
        host_network: true,
        ..pod(1, &[7], &[])
    };
    draft.put_workload(spec).unwrap();
    let mesh = draft.finish();
    assert!(mesh.workload_by_ip("", address(7)).is_none());
    assert!(mesh.workload_by_uid("uid-1").is_some());
}

fn off() -> Annotations {
    Annotations {
        direct: Some(false),
        ..Annotations::default()
    }
}

/// For a deployment, of which `name-1` and `name-2` are, and for one pod of it.
fn said() -> Namespaces {
    let on = Annotations {
        direct: Some(true),
        ..Annotations::default()
    };
    let said = NamespaceAnnotations {
        general: Annotations::default(),
        deployments: [("deployment".into(), off())].into(),
        pods: [("name-2".into(), on)].into(),
    };
    [("ns".into(), said)].into()
}

proptest! {
    #[test]
    fn annotations_that_come_late_make_the_mesh_that_they_would_have_made(
        changes in prop::collection::vec(change(), 0..40),
    ) {
        let (defaults, silent, said) = (MeshDefaults::default(), Namespaces::new(), said());
        let mut shared = SharedTraits::default();
        let mut before = Draft::of(&Mesh::default(), &defaults, &silent, &mut shared);
        for change in &changes {
            apply(&mut before, change);
        }
        let before = before.finish();
        let was = answers(&before);
        let mut late = Draft::of(&before, &defaults, &said, &mut shared);
        late.annotate();
        let late = late.finish();
        prop_assert_eq!(was, answers(&before), "the old mesh changed");
        let mut early = Draft::of(&Mesh::default(), &defaults, &said, &mut shared);
        for change in &changes {
            apply(&mut early, change);
        }
        prop_assert_eq!(answers(&late), answers(&early.finish()));
    }
}

#[test]
fn the_pods_name_counts_before_its_deployments_and_that_before_its_namespaces() {
    let (defaults, mut namespaces) = (MeshDefaults::default(), said());
    let mut shared = SharedTraits::default();
    let direct = |mesh: &Mesh| {
        [1, 3, 4, 6].map(|uid| mesh.workload_by_uid(&format!("uid-{uid}")).unwrap().direct)
    };
    let mut draft = Draft::of(&Mesh::default(), &defaults, &namespaces, &mut shared);
    for uid in [1, 3, 4, 6] {
        let mut spec = pod(uid, &[], &[]);
        if uid == 6 {
            spec.workload_name = "".into();
        }
        draft.put_workload(spec).unwrap();
    }
    let mesh = draft.finish();
    assert_eq!(direct(&mesh), [false, false, true, true]);

    namespaces.get_mut("ns").unwrap().general = off();
    let mut draft = Draft::of(&mesh, &defaults, &namespaces, &mut shared);
    assert_eq!(draft.annotate(), 1);
    let mesh = draft.finish();
    assert_eq!(direct(&mesh), [false, false, true, false]);

    let silent = Namespaces::new();
    let mut draft = Draft::of(&mesh, &defaults, &silent, &mut shared);
    assert_eq!(draft.annotate(), 3);
    assert_eq!(direct(&draft.finish()), [true; 4]);
}

#[test]
fn annotated_pods_of_a_deployment_go_on_sharing_what_they_have_in_common() {
    let (defaults, silent, said) = (MeshDefaults::default(), Namespaces::new(), said());
    let mut shared = SharedTraits::default();
    let mut draft = Draft::of(&Mesh::default(), &defaults, &silent, &mut shared);
    for uid in 0..200 {
        draft.put_workload(pod(uid, &[uid], &[])).unwrap();
    }
    let mesh = draft.finish();
    let mut draft = Draft::of(&mesh, &defaults, &said, &mut shared);
    // But for the two called name-2.
    assert_eq!(draft.annotate(), 198);
    let mesh = draft.finish();
    let traits: BTreeSet<_> = mesh
        .workloads()
        .map(|workload| Arc::as_ptr(&workload.traits))
        .collect();
    assert_eq!(traits.len(), 2);
}
