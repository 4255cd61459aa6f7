use super::*;
use clap::Parser;
use proptest::prelude::*;

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    vm: VmConfig,
}

fn flags(text: &str) -> Result<VmConfig, clap::Error> {
    let arguments = ["test"].into_iter().chain(text.split_ascii_whitespace());
    Flags::try_parse_from(arguments).map(|flags| flags.vm)
}

#[test]
fn flags_toml_and_json_say_the_same() {
    let by_flags = flags(
        "--kernel vmlinuz --memory 1G --cpus 2 --disk a.img --disk path=b.qcow2,readonly=on,engine=io_uring,persistent=off \
         --disk path=/dev/c,stripe=/dev/d:/dev/e \
         --net tap,host_ip=10.0.0.1/24,mac=52:54:00:00:00:01 --net vhost-user=/run/vu.sock,queues=2 --serial socket=s,log=l --hugepages 2m --rng false",
    )
    .unwrap();
    let by_toml: VmConfig = toml::from_str(
        r#"
        kernel = "vmlinuz"
        memory = "1G"
        cpus = 2
        hugepages = "2m"
        rng = false
        serial = { socket = "s", log = "l" }
        [[disk]]
        path = "a.img"
        [[disk]]
        path = "b.qcow2"
        readonly = true
        engine = "io_uring"
        persistent = false
        [[disk]]
        path = "/dev/c"
        stripe = ["/dev/d", "/dev/e"]
        [[net]]
        host_ip = "10.0.0.1/24"
        mac = "52:54:00:00:00:01"
        [[net]]
        vhost-user = "/run/vu.sock"
        queues = 2
        "#,
    )
    .unwrap();
    assert_eq!(by_flags, by_toml);
    let json = serde_json::to_string(&by_flags).unwrap();
    assert_eq!(serde_json::from_str::<VmConfig>(&json).unwrap(), by_flags);
    by_flags.validate().unwrap();
}

#[test]
fn a_bad_key_or_value_is_named() {
    for (text, named) in [
        ("--disk path=a,speed=9", "speed"),
        ("--net queues=many", "number"),
        ("--net tap,fast", "key=value"),
        ("--memory lots", "512M"),
        ("--net mac=01:00:00:00:00:00", "unicast"),
        ("--disk readonly=on", "path"),
    ] {
        let error = flags(text).unwrap_err().to_string();
        assert!(error.contains(named), "{text}: {error}");
    }
    let error = toml::from_str::<VmConfig>("memroy = 1").unwrap_err();
    assert!(error.to_string().contains("memroy"));
}

#[test]
fn what_cannot_work_is_refused_before_anything_is_touched() {
    for text in [
        "",
        "--kernel k --cpus 0",
        "--kernel k --cpus 65",
        "--kernel k --memory 1M",
        "--kernel k --memory 16777217",
        "--kernel k --io-threads 17",
        "--kernel k --memory 1021G",
        "--kernel k --memory 2T --cpu x86-64-v3",
        "--kernel k --net queues=17",
        "--kernel k --net vhost-user=/run/s,tap=tap0",
        "--kernel k --net vhost-user=/run/s,host_ip=10.0.0.1/24",
        "--kernel k --serial stdio --console stdio",
    ] {
        assert!(flags(text).unwrap().validate().is_err(), "{text}");
    }
}

#[test]
fn what_flags_state_prevails_over_the_file() {
    let file = flags("--kernel a --memory 1G --disk x").unwrap();
    let merged = file.overlaid(flags("--memory 2G --disk y --disk z").unwrap());
    assert_eq!(merged.memory(), 2 << 30);
    assert_eq!(merged.kernel.unwrap(), Path::new("a"));
    assert_eq!(merged.disk.len(), 2);
}

proptest! {
    #[test]
    fn sizes_are_read_back_as_printed(bytes: u64) {
        let size = ByteSize(bytes);
        prop_assert_eq!(size.to_string().parse::<ByteSize>().unwrap(), size);
    }

    #[test]
    fn no_text_panics(text: String) {
        let _ = text.parse::<ByteSize>();
        let _ = (parse_disk(&text), parse_net(&text), parse_char(&text));
        let _ = toml::from_str::<VmConfig>(&text);
    }
}
