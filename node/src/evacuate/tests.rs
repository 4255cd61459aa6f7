use super::*;

#[test]
fn a_guest_is_in_the_directory_with_its_note_and_nothing_else_is() {
    let dir = tempfile::tempdir().unwrap();
    let held = Held::make(&dir.path().join("deep/down")).unwrap();
    assert_eq!(held.names().unwrap(), Vec::<String>::new());
    // One that was cut off.
    fs::write(held.snapshot("cut"), "x").unwrap();
    fs::write(held.path.join("off.snapshot.partial"), "x").unwrap();
    for name in ["web", "db"] {
        fs::write(held.snapshot(name), "x").unwrap();
        fs::write(held.note(name), "{}").unwrap();
    }
    assert_eq!(held.names().unwrap(), ["db", "web"]);
    held.remove("web").unwrap();
    held.remove("web").unwrap();
    assert_eq!(held.names().unwrap(), ["db"]);
    assert!(!held.snapshot("web").exists());
}

#[test]
fn nothing_runs_so_nothing_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let home = Home::locate(Some(&dir.path().join("home"))).unwrap();
    let to = dir.path().join("to");
    assert!(save_all(&home, &to, None).unwrap().is_empty());
    assert!(!to.exists());
    bring_back(&home, &to, None).unwrap();
}

#[test]
fn the_user_of_a_monitor_is_noted_unless_it_is_the_usual_one() {
    let own = user_of(std::process::id()).unwrap();
    let root = rustix::process::geteuid().is_root();
    assert_eq!(own.is_some(), root);
}
