use super::*;

fn path(text: &str) -> Path {
    Path::new(text).unwrap()
}

fn permissions(text: &str) -> Permissions {
    Permissions::parse(text.split(' ')).unwrap()
}

fn write(text: &str, value: &str) -> Op {
    Op::Write(path(text), value.into())
}

/// A tree with a node of the given permissions.
fn tree(node: &str, entries: &str) -> Tree {
    let mut tree = Tree::default();
    tree.apply(Who::Toolstack, &write(node, "old"), 1).unwrap();
    let op = Op::SetPermissions(path(node), permissions(entries));
    tree.apply(Who::Toolstack, &op, 2).unwrap();
    tree
}

fn guest(tree: &mut Tree, op: &Op) -> Result<Vec<Change>, Errno> {
    tree.apply(Who::Guest, op, 9)
}

#[test]
fn a_guest_sees_and_changes_what_permissions_let_it() {
    for (entries, read, write_, own) in [
        ("n0", false, false, false),
        ("n0 r1", true, false, false),
        ("n0 w1", false, true, false),
        ("n0 b1", true, true, false),
        ("n1", true, true, true),
    ] {
        let mut tree = tree("/a/b", entries);
        assert_eq!(tree.read(Who::Guest, &path("/a/b")).is_ok(), read);
        assert_eq!(tree.directory(Who::Guest, &path("/a/b")).is_ok(), read);
        assert_eq!(tree.permissions(Who::Guest, &path("/a/b")).is_ok(), read);
        for op in [
            write("/a/b", "new"),
            write("/a/b/c/d", "new"),
            Op::Mkdir(path("/a/b/e")),
        ] {
            let done = guest(&mut tree, &op);
            let expected = if write_ { Ok(()) } else { Err(Errno::Access) };
            assert_eq!(done.map(drop), expected, "{entries}: {op:?}");
        }
        let op = Op::SetPermissions(path("/a/b"), permissions("n1 r0"));
        assert_eq!(guest(&mut tree, &op).is_ok(), own, "{entries}");
        assert_eq!(guest(&mut tree, &Op::Remove(path("/a/b"))).is_ok(), write_);
    }
}

#[test]
fn whoever_may_not_read_a_directory_learns_nothing_about_its_nodes() {
    let tree = tree("/a/b", "n0 r1");
    assert_eq!(
        tree.read(Who::Guest, &path("/a/b/none")),
        Err(Errno::NoEntry)
    );
    assert_eq!(tree.read(Who::Guest, &path("/a/none")), Err(Errno::Access));
    assert_eq!(tree.read(Who::Guest, &path("/none")), Err(Errno::Access));
    assert_eq!(
        tree.read(Who::Toolstack, &path("/none")),
        Err(Errno::NoEntry)
    );
}

#[test]
fn new_nodes_are_their_makers_and_inherit_the_rest() {
    let mut tree = tree("/a", "n0 b1 r7");
    guest(&mut tree, &write("/a/x/y", "v")).unwrap();
    for node in ["/a/x", "/a/x/y"] {
        let entries = tree.permissions(Who::Toolstack, &path(node)).unwrap();
        assert_eq!(entries.entries().join(" "), "n1 b1 r7");
    }
    assert_eq!(tree.guest_nodes(), 2);
    let gift = Op::SetPermissions(path("/a/x"), permissions("n0"));
    assert_eq!(guest(&mut tree, &gift), Err(Errno::Access));
    guest(&mut tree, &Op::Remove(path("/a/x"))).unwrap();
    assert_eq!(tree.guest_nodes(), 0);
    assert_eq!(tree.subtree(&path("/a")), [path("/a")]);
}

#[test]
fn a_guests_nodes_and_values_are_bounded_and_removing_makes_room() {
    let mut tree = tree("/a", "n1");
    let mut made = 0;
    while guest(&mut tree, &write(&format!("/a/{made}"), "")).is_ok() {
        made += 1;
        assert!(made <= MAX_NODES);
    }
    assert_eq!(tree.guest_nodes(), MAX_NODES);
    assert_eq!(
        guest(&mut tree, &Op::Mkdir(path("/a/more"))),
        Err(Errno::NoSpace)
    );
    guest(&mut tree, &write("/a/0", "what is there can change")).unwrap();
    guest(&mut tree, &Op::Remove(path("/a/0"))).unwrap();
    guest(&mut tree, &Op::Mkdir(path("/a/more"))).unwrap();
    let long = "x".repeat(MAX_VALUE + 1);
    assert_eq!(guest(&mut tree, &write("/a/1", &long)), Err(Errno::NoSpace));
    guest(&mut tree, &write("/a/1", &long[1..])).unwrap();
    tree.apply(Who::Toolstack, &write("/a/by-the-monitor", &long), 10)
        .unwrap();
}

#[test]
fn a_removal_tells_of_each_node_below_too() {
    let mut tree = tree("/a/b", "n1");
    guest(&mut tree, &write("/a/b/c/d", "")).unwrap();
    let gone = guest(&mut tree, &Op::Remove(path("/a/b"))).unwrap();
    let told: Vec<_> = gone.iter().map(|c| (c.path.as_str(), c.exact)).collect();
    assert_eq!(
        told,
        [("/a/b", false), ("/a/b/c", true), ("/a/b/c/d", true)]
    );
    assert!(gone.iter().all(|change| change.visible));
    let who = Who::Toolstack;
    let again = tree.apply(who, &Op::Remove(path("/a/b")), 9);
    assert_eq!(again, Ok(vec![]));
    let nowhere = tree.apply(who, &Op::Remove(path("/a/b/c")), 9);
    assert_eq!(nowhere, Err(Errno::NoEntry));
    let root = tree.apply(who, &Op::Remove(path("/")), 9);
    assert_eq!(root, Err(Errno::Invalid));
}

#[test]
fn a_copy_does_not_change_and_a_saved_tree_is_the_same() {
    let mut tree = tree("/a/b", "n1");
    let copy = tree.clone();
    guest(&mut tree, &write("/a/b/c", "new")).unwrap();
    assert_eq!(copy.generation(&path("/a/b/c")), None);
    assert!(!copy.is_same(&tree));
    let restored = Tree::restore(tree.save()).unwrap();
    assert_eq!(restored.save(), tree.save());
    assert_eq!(restored.guest_nodes(), tree.guest_nodes());
    let mut torn = tree.save();
    torn.remove(1);
    assert_eq!(Tree::restore(torn).unwrap_err(), Errno::NoEntry);
}
