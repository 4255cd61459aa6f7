use std::fs;
use std::path::Path;

use blanket_drivers::probe::Virtualization;
use tempfile::TempDir;

use super::*;

/// A machine of files: modules are loaded, 8 GiB of memory are free.
struct Fake {
    dir: TempDir,
    system: System,
}

impl Fake {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let system = System::under(dir.path());
        let fake = Self { dir, system };
        for (path, text) in [
            ("/sys/class/misc/kvm/dev", "10:232"),
            ("/sys/class/misc/tun/dev", "10:200"),
            ("/sys/module/tun/initstate", "live"),
            (
                "/sys/kernel/mm/transparent_hugepage/enabled",
                "always [madvise] never",
            ),
            ("/proc/sys/vm/nr_hugepages", "3\n"),
            (
                "/proc/meminfo",
                "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\nHugepagesize:       2048 kB\n",
            ),
        ] {
            fake.put(path, text);
        }
        fake
    }

    fn put(&self, path: &str, text: &str) {
        self.system.write_file(path, text).unwrap();
    }

    fn text(&self, path: &str) -> Option<String> {
        self.system.read(path).unwrap()
    }

    fn book(&self) -> Book {
        Book::open(&self.dir.path().join("state/up.json")).unwrap()
    }

    /// The wants that are not this machine's interfaces and volumes.
    fn wants(&self, book: &Book) -> Result<Vec<Want>> {
        let ours = book.record.changes.iter().filter_map(Change::setting);
        let mut all = wants(&Node {
            system: &self.system,
            kvm: Virtualization::Svm,
            options: &book.record.options,
            ours: ours.collect(),
            notices: true,
            program: "/usr/bin/blanket".into(),
            daemon: Some("/50% $HOME/blanketd".into()),
            switch: Some("/usr/bin/blanket-switch".into()),
            outside: Some(("eth0".to_owned(), "10.0.0.1".parse().unwrap())),
            evacuated: "/mnt/50% $HOME".into(),
            uplinks: "/none".into(),
            stores: "/none".into(),
        })?;
        all.retain(|want| !["uplink", "store"].contains(&want.area));
        Ok(all)
    }

    fn plan(&self, book: &Book) -> Plan {
        Plan::of(self.wants(book).unwrap(), book, &self.system).unwrap()
    }

    /// `blanket up`, but for programs.
    fn up(&self, book: &mut Book) {
        let plan = self.plan(book);
        for change in plan.stale {
            assert_eq!(change.undo(&self.system, false).unwrap(), Undone::Yes);
            book.strike(&change.target.identity()).unwrap();
        }
        for want in plan.wants {
            want.fulfil(book, &self.system).unwrap();
        }
    }

    fn down(&self, book: &mut Book) {
        for change in book.record.changes.clone().iter().rev() {
            assert_eq!(change.undo(&self.system, false).unwrap(), Undone::Yes);
            book.strike(&change.target.identity()).unwrap();
        }
    }

    /// Every file below the root and what it says.
    fn files(&self, path: &Path) -> Vec<(String, String)> {
        let mut all = Vec::new();
        for entry in fs::read_dir(path).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                all.push((path.display().to_string(), "a folder".to_owned()));
                all.extend(self.files(&path));
            } else {
                let text = fs::read_to_string(&path).unwrap();
                all.push((path.display().to_string(), text));
            }
        }
        all.sort();
        all
    }
}

const HUGE: &str = "/proc/sys/vm/nr_hugepages";
const TRANSPARENT: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

#[test]
fn a_second_time_there_is_nothing_to_do_and_undoing_leaves_no_trace() {
    let fake = Fake::new();
    fake.put(TRANSPARENT, "always madvise [never]");
    let mut book = fake.book();
    book.record.options.hugepages = Some(1 << 30);
    let before = fake.files(fake.dir.path());
    assert!(!fake.plan(&book).is_empty());
    assert_eq!(
        fake.files(fake.dir.path()),
        before,
        "a plan changes nothing"
    );
    fake.up(&mut book);
    assert_eq!(fake.text(HUGE).unwrap(), "512");
    assert_eq!(fake.text(TRANSPARENT).unwrap(), "madvise");
    let sysctl = fake.text("/etc/sysctl.d/90-blanket.conf").unwrap();
    assert!(sysctl.contains("vm.nr_hugepages = 512"), "{sysctl}");
    let modules = fake.text("/etc/modules-load.d/blanket.conf").unwrap();
    // KVM is built in here.
    assert!(
        modules.ends_with("\ntun\n") && !modules.contains("kvm"),
        "{modules}"
    );
    drop(book);
    // As a later command reads it.
    let mut book = fake.book();
    assert!(fake.plan(&book).is_empty(), "{:?}", fake.plan(&book));
    fake.down(&mut book);
    book.record.options = Options::default();
    book.store().unwrap();
    let after = fake.files(fake.dir.path());
    let settings = |all: &[(String, String)]| {
        let mut all = all.to_vec();
        all.retain(|(path, _)| !path.ends_with("enabled") && !path.ends_with("nr_hugepages"));
        all
    };
    assert_eq!(settings(&after), settings(&before));
    assert_eq!(fake.text(HUGE).unwrap(), "3");
    assert_eq!(fake.text(TRANSPARENT).unwrap(), "never");
}

#[test]
fn what_is_not_asked_for_any_more_is_given_back_and_the_first_value_remembered() {
    let fake = Fake::new();
    let mut book = fake.book();
    for (bytes, pages) in [(1 << 30, "512"), (64 << 20, "32"), (128 << 20, "64")] {
        book.record.options.hugepages = Some(bytes);
        fake.up(&mut book);
        assert_eq!(fake.text(HUGE).unwrap(), pages);
    }
    book.record.options.hugepages = None;
    fake.up(&mut book);
    assert_eq!(fake.text(HUGE).unwrap(), "3");
    assert_eq!(fake.text("/etc/sysctl.d/90-blanket.conf"), None);
}

#[test]
fn more_huge_pages_than_there_is_memory_are_refused_with_the_most_that_goes() {
    let fake = Fake::new();
    let mut book = fake.book();
    // 8 GiB are free, of which an eighth of 16 stays.
    book.record.options.hugepages = Some((6 << 30) + (6 << 20));
    assert!(fake.wants(&book).is_ok());
    book.record.options.hugepages = Some((6 << 30) + (8 << 20));
    let error = crate::failure::describe(&fake.wants(&book).unwrap_err());
    assert!(error.contains("--hugepages 6150M"), "{error}");
    // Somebody needs more than we do: that stays.
    fake.put(HUGE, "9999");
    let all = fake.wants(&book).unwrap();
    assert!(all.iter().all(|want| want.area != "hugepages"));
}

#[test]
fn what_somebody_else_has_set_since_is_left_to_them() {
    let fake = Fake::new();
    let mut book = fake.book();
    book.record.options.hugepages = Some(1 << 30);
    fake.up(&mut book);
    let change = book.record.changes.iter().find(|it| it.setting().is_some());
    let change = change.unwrap().clone();
    fake.put(HUGE, "1000");
    let undone = change.undo(&fake.system, false).unwrap();
    assert!(
        matches!(&undone, Undone::Left(why) if why.contains("1000")),
        "{undone:?}"
    );
    assert_eq!(fake.text(HUGE).unwrap(), "1000");
    // The kernel found no more than these: they are ours.
    fake.put(HUGE, "200");
    assert_eq!(change.undo(&fake.system, false).unwrap(), Undone::Yes);
    assert_eq!(fake.text(HUGE).unwrap(), "3");
}

#[test]
fn units_name_their_paths_as_systemd_reads_them() {
    let fake = Fake::new();
    assert!(
        fake.wants(&fake.book())
            .unwrap()
            .iter()
            .all(|it| it.area != "service")
    );
    fs::create_dir_all(fake.system.path("/run/systemd/system")).unwrap();
    let all = fake.wants(&fake.book()).unwrap();
    let texts: Vec<_> = all
        .iter()
        .filter_map(|want| match &want.target {
            change::Target::File { path, content } if want.area == "service" => {
                Some((path.display().to_string(), content.as_str()))
            }
            _ => None,
        })
        .collect();
    let names: Vec<_> = texts.iter().map(|(path, _)| path.as_str()).collect();
    let folder = "/etc/systemd/system";
    assert_eq!(
        names,
        [
            format!("{folder}/blanket.service"),
            format!("{folder}/blanket-watch.service"),
            format!("{folder}/blanketd.service"),
            format!("{folder}/blanket-switch.service")
        ]
    );
    let (guests, others) = texts.split_at(2);
    let [(_, daemon), (_, switch)] = others else {
        panic!("{others:?}");
    };
    assert!(
        switch.contains(
            "ExecStart=\"/usr/bin/blanket-switch\" --listen 10.0.0.1:4790 --interface eth0\n"
        ),
        "{switch}"
    );
    for line in [
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW CAP_CHOWN CAP_SETPCAP",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK",
        "ProtectSystem=strict",
        "StateDirectory=blanket/switch",
        "SystemCallArchitectures=native",
    ] {
        assert!(switch.lines().any(|it| it == line), "{line}: {switch}");
    }
    assert!(
        daemon.contains("ExecStart=\"/50%% $$HOME/blanketd\"\n"),
        "{daemon}"
    );
    for (_, text) in guests {
        assert!(
            text.contains("RequiresMountsFor=\"/mnt/50%% $HOME\"\n"),
            "{text}"
        );
        assert!(text.contains("--to \"/mnt/50%% $$HOME\"\n"), "{text}");
    }
}

#[test]
fn a_damaged_record_is_named_and_two_commands_do_not_meet() {
    let fake = Fake::new();
    let path = fake.dir.path().join("state/up.json");
    let book = fake.book();
    let second = Book::open(&path).unwrap_err().to_string();
    assert!(second.contains("at work"), "{second}");
    drop(book);
    fs::write(&path, "{").unwrap();
    let error = Book::look(&path).unwrap_err().to_string();
    assert!(error.contains("up.json is damaged"), "{error}");
}
