//! Tests the configuration of `serve`: precedence, defaults that follow from other values, refused values.

use std::collections::BTreeMap;

use clap::CommandFactory;
use issue_tracker::config::Cli;

use super::*;

/// Runs `serve --print-config` with these arguments and environment variables.
fn print_config(args: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = program(&[&["serve", "--print-config"], args].concat());
    finished(command.envs(variables.iter().copied()).spawn().unwrap())
}

/// Returns the printed value and source of each flag.
#[track_caller]
fn effective(args: &[&str], variables: &[(&str, &str)]) -> BTreeMap<String, (String, String)> {
    let output = print_config(args, variables);
    assert!(output.status.success(), "{output:?}");
    let lines = text(&output.stdout).lines().map(|line| {
        let (setting, source) = line.split_once("  # source: ").expect(line);
        let (flag, value) = setting.trim_start_matches('#').split_once('=').expect(line);
        (flag.to_owned(), (value.to_owned(), source.to_owned()))
    });
    lines.collect()
}

/// Asserts the value and source of flags.
#[track_caller]
fn assert_effective(args: &[&str], variables: &[(&str, &str)], expected: &[(&str, &str, &str)]) {
    let effective = effective(args, variables);
    for (flag, value, source) in expected {
        assert_eq!(effective[*flag], ((*value).to_owned(), (*source).to_owned()), "{flag} with {args:?} {variables:?}");
    }
}

#[test]
fn print_config_shows_every_flag_and_starts_nothing() {
    let dir = Dir::new();
    let occupied = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = occupied.local_addr().unwrap().to_string();
    let missing = dir.text("missing.pem");
    let args = ["--listen", &listen, "--data-dir", &dir.data(), "--tls-cert", &missing, "--tls-key", &missing];
    let output = print_config(&args, &[]);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
    assert!(!dir.path("data").exists());

    let shown = effective(&args, &[]);
    let command = Cli::command();
    let serve = command.find_subcommand("serve").unwrap();
    let flags = serve.get_arguments().chain(command.get_arguments()).filter_map(|arg| arg.get_long());
    for flag in flags.filter(|flag| *flag != "print-config") {
        assert!(shown.contains_key(&format!("--{flag}")), "--{flag} is not printed");
    }
    assert!(!shown.contains_key("--print-config") && !shown.contains_key("--help"), "{shown:?}");

    let without_subcommand = run(&[&["--print-config"], &args[..]].concat());
    assert_eq!(text(&without_subcommand.stdout), text(&output.stdout));
}

#[test]
fn flag_takes_precedence_over_variable_and_variable_over_default() {
    let variables =
        [("ISSUE_TRACKER_REQUESTS", "7"), ("ISSUE_TRACKER_LOG", "debug"), ("ISSUE_TRACKER_DEADLINE_MS", "8")];
    let expected = [
        ("--requests", "9", "flag"),
        ("--log-level", "debug", "environment ISSUE_TRACKER_LOG"),
        ("--deadline-ms", "8", "environment ISSUE_TRACKER_DEADLINE_MS"),
        ("--streams", "256", "default"),
        ("--trusted-proxies", "", "default"),
    ];
    assert_effective(&["--requests", "9"], &variables, &expected);
}

#[test]
fn flag_that_is_on_or_off_overrides_its_variable_too() {
    for arg in Cli::command().get_arguments().filter(|arg| arg.get_env().is_some()) {
        assert!(arg.get_action().takes_values(), "{arg} cannot be set to false");
    }
    let variable = ("ISSUE_TRACKER_INSECURE_PLAINTEXT", "true");
    assert_effective(&["--insecure-plaintext=false"], &[variable], &[("--insecure-plaintext", "false", "flag")]);
    assert_effective(&["--insecure-plaintext"], &[], &[("--insecure-plaintext", "true", "flag")]);
}

#[test]
fn empty_variable_counts_as_not_set() {
    let command = Cli::command();
    let variables: Vec<_> = command.get_arguments().filter_map(|arg| Some((arg.get_env()?.to_str()?, ""))).collect();
    assert_eq!(effective(&[], &variables), effective(&[], &[]));

    let nothing = run(&["health", "--listen", "127.0.0.1:1"]);
    let empty = finished(
        program(&["health", "--listen", "127.0.0.1:1"])
            .envs([("ISSUE_TRACKER_SERVER", ""), ("ISSUE_TRACKER_CLIENT_CERT", ""), ("ISSUE_TRACKER_CA_CERT", "")])
            .spawn()
            .unwrap(),
    );
    assert_eq!(text(&empty.stderr), text(&nothing.stderr));
}

#[test]
fn command_ignores_the_variables_of_other_commands() {
    let mut command = program(&["health", "--listen", "127.0.0.1:1"]);
    command.envs([("ISSUE_TRACKER_REQUESTS", "many"), ("ISSUE_TRACKER_TLS_CERT", "x.pem"), ("DATABASE_URL", "x")]);
    let output = finished(command.spawn().unwrap());
    assert_refused(&output, "cannot connect to 127.0.0.1:1");
    assert!(!text(&output.stderr).contains("--requests"), "{output:?}");
}

#[test]
fn printed_configuration_can_be_used_as_arguments() {
    let variables = [("ISSUE_TRACKER_DATA_DIR", "/srv/it's a \"data\" dir"), ("ISSUE_TRACKER_REQUESTS", "50")];
    let args = ["--pool-connections", "8", "--insecure-plaintext", "--trusted-proxies", "10.0.0.0/8,::1"];
    let printed = print_config(&args, &variables);
    let arguments: Vec<_> = text(&printed.stdout)
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split_once("  # source: ").unwrap().0)
        .collect();
    let script = format!("exec \"$0\" serve --print-config {}", arguments.join(" "));
    let mut shell = std::process::Command::new("sh");
    shell
        .env_remove("DATABASE_URL")
        .args(["-c", &script, env!("CARGO_BIN_EXE_issue-tracker")])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let again = finished(shell.spawn().unwrap());
    assert!(again.status.success(), "{again:?}");
    let values = |output: &Output| {
        let lines = text(&output.stdout).lines().map(|line| line.split_once("  # source: ").unwrap().0.to_owned());
        lines.collect::<Vec<_>>()
    };
    assert_eq!(values(&again), values(&printed));
}

#[test]
fn printed_configuration_contains_no_secret() {
    let url = |text: &str| format!("postgresql://{text}/tracker");
    for (connection, shown) in [
        (url(&format!("me:{SECRET}@db")), "'postgresql://me:***@db/tracker'"),
        (format!("{}?password={SECRET}&connect_timeout=3", url("me@db")), "password=***&connect_timeout=3"),
        (format!("host=db user=me password={SECRET}"), "'host=db user=me password=***'"),
        (format!("host=db password='{SECRET} x' user=me"), "'host=db password=*** user=me'"),
    ] {
        let by_flag = print_config(&["--database-url", &connection], &[]);
        let by_variable = print_config(&[], &[("DATABASE_URL", &connection), ("PGPASSWORD", SECRET)]);
        for (output, source) in [(by_flag, "flag"), (by_variable, "environment DATABASE_URL")] {
            assert!(output.status.success(), "{output:?}");
            assert!(!text(&output.stdout).contains(SECRET), "{output:?}");
            let line = text(&output.stdout).lines().find(|line| line.starts_with("#--database-url=")).unwrap();
            assert!(line.contains(shown) && line.ends_with(&format!("# source: {source}")), "{line}");
        }
    }
    let without_password = "postgresql://me@db/tracker";
    let output = print_config(&["--database-url", without_password], &[]);
    assert!(text(&output.stdout).contains(&format!("\n--database-url={without_password}  #")), "{output:?}");

    // These cannot be parsed. What is set is printed all the same, with what is wrong.
    for connection in [url(&format!("me:p@{SECRET}@db")), format!("{SECRET}=x"), SECRET.to_owned()] {
        let output = print_config(&["--database-url", &connection], &[]);
        assert_refused(&output, "--database-url: ");
        assert!(text(&output.stdout).contains("#--database-url='***'"), "{output:?}");
        assert!(!format!("{output:?}").contains(SECRET), "{output:?}");
    }

    let dir = Dir::new();
    let key = dir.text("key.pem");
    fs::write(&key, SECRET).unwrap();
    let output = print_config(&["--tls-cert", &key, "--tls-key", &key], &[]);
    assert!(text(&output.stdout).contains(&format!("--tls-key={key}  # source: flag")), "{output:?}");
    assert!(!text(&output.stdout).contains(SECRET), "{output:?}");
}

#[test]
fn defaults_follow_from_values_that_would_exclude_them() {
    let streams = "derived from --pool-connections, --requests and";
    for (args, expected) in [
        (&["--pool-connections", "8"][..], [("--imports", "4"), ("--exports", "1")]),
        (&["--pool-connections", "3"], [("--imports", "1"), ("--exports", "1")]),
        (&["--pool-connections", "12", "--exports", "9"], [("--imports", "2"), ("--exports", "9")]),
        (&["--imports", "18", "--pool-connections", "20"], [("--exports", "1"), ("--imports", "18")]),
        (&["--requests", "8"], [("--imports", "4"), ("--exports", "1")]),
        (&["--requests", "1"], [("--imports", "1"), ("--exports", "1")]),
        (&["--pool-connections", "100"], [("--imports", "10"), ("--exports", "4")]),
        (&["--imports", "30"], [("--pool-connections", "40"), ("--exports", "4")]),
        (&["--imports", "1"], [("--pool-connections", "20"), ("--exports", "4")]),
        (&["--export-seconds", "7200"], [("--age-grace-seconds", "7200"), ("--export-seconds", "7200")]),
        (&["--export-seconds", "60"], [("--age-grace-seconds", "3600"), ("--export-seconds", "60")]),
        (&["--import-days", "7"], [("--import-error-days", "7"), ("--import-days", "7")]),
    ] {
        let effective = effective(args, &[]);
        for (flag, value) in expected {
            assert_eq!(effective[flag].0, value, "{flag} with {args:?}");
        }
    }
    let effective = effective(&["--pool-connections", "8"], &[]);
    assert_eq!(effective["--imports"].1, format!("{streams} --exports"));
    assert_eq!(effective["--exports"].1, format!("{streams} --imports"));
}

#[test]
fn all_impossible_combinations_are_reported_before_anything_starts() {
    let dir = Dir::new();
    let data = dir.data();
    let args = [
        "--listen=0.0.0.0:0",
        "--tls-client-ca=ca.pem",
        "--imports=5",
        "--exports=4",
        "--pool-connections=9",
        "--requests=9",
        "--user-share-percent=10",
        "--message-bytes=67108864",
        "--import-error-days=31",
        "--import-days=30",
        "--data-dir",
        &data,
    ];
    for command in [&[][..], &["serve"], &["serve", "--print-config"]] {
        let output = run(&[command, &args].concat());
        assert_eq!(output.status.code(), Some(2));
        for problem in [
            "6 settings are impossible:",
            "--listen 0.0.0.0:0: other machines can connect",
            "--tls-client-ca: requires TLS; set --tls-cert and --tls-key too",
            "--imports 5 and --exports 4: together they must be less than --pool-connections 9",
            "--imports 5 and --exports 4: together they must be less than --requests 9",
            "--user-share-percent 10: ",
            "--import-error-days 31: must be at most --import-days 30",
        ] {
            assert_refused(&output, problem);
        }
        assert!(!dir.path("data").exists());
    }
}

#[test]
fn wrong_values_are_refused_with_flag_and_remedy() {
    let dir = Dir::new();
    for (args, why) in [
        (&["--imports", "5", "--pool-connections", "5"][..], "must be less than --pool-connections 5"),
        (&["--imports", "999"], "must be less than --pool-connections 1000"),
        (&["--imports", "0"], "--imports"),
        (&["--exports", "0"], "--exports"),
        (&["--pool-connections", "2"], "2 is not in 3..=1000"),
        (&["--streams", "1"], "1 is not in 2..=10000"),
        (&["--bcrypt-cost", "3"], "--bcrypt-cost"),
        (&["--bcrypt-cost", "19"], "19 is not in 4..=18"),
        (&["--requests", "99999999999999999999"], "--requests"),
        (&["--requests", "-5"], "'--requests <N>': -5 is not in 1..=100000"),
        (&["--deadline-ms", "-5"], "expected a whole number of milliseconds"),
        (&["--requests=-5"], "-5 is not in 1..=100000"),
        (&["--requests", "1", "--requests", "2"], "'--requests <N>' cannot be used multiple times"),
        (&["--requests", "1_000"], "expected a whole number, without a unit or separators"),
        (&["--message-bytes", "4MiB"], "expected a whole number of bytes, without a unit or separators"),
        (&["--import-seconds", "24h"], "expected a whole number of seconds, without a unit or separators"),
        (&["--pool-wait-ms", "2s"], "expected a whole number of milliseconds"),
        (&["--user-share-percent", "50%"], "expected a whole number, in percent"),
        (&["--listen", "localhost:50051"], "expected an IP address and a port, such as 127.0.0.1:50051"),
        (&["--listen", ":50051"], "0.0.0.0:50051 and [::]:50051 are all addresses"),
        (&["--listen", "50051"], "--listen"),
        (&["--listen", "127.0.0.1:99999"], "--listen"),
        (&["--tls-cert", "a.pem"], "--tls-cert: has no private key; set --tls-key too"),
        (&["--tls-key", "a.pem"], "--tls-key: has no certificate; set --tls-cert too"),
        (&["--tls-client-ca", "a.pem"], "--tls-client-ca: requires TLS"),
        (&["--insecure-plaintext=perhaps"], "--insecure-plaintext"),
        (&["--trusted-proxies", "proxy.example"], "--trusted-proxies"),
        (&["--database-url", ""], "--database-url: the database URL names no host"),
        (&["--database-url", "tracker"], "--database-url: the database URL is malformed"),
        (&["--log-level", "loud"], "--log-level"),
        (&["--colour", "red"], "--colour"),
    ] {
        let output = run(&[&["--data-dir", &dir.data()], args].concat());
        assert_refused(&output, why);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(2), ""), "{args:?}");
        assert!(!dir.path("data").exists(), "{args:?}");
    }
}

#[test]
fn error_names_the_variable_that_a_wrong_value_is_from() {
    let wrong = [("ISSUE_TRACKER_REQUESTS", "many")];
    let is_named = "tip: the value is that of the environment variable ISSUE_TRACKER_REQUESTS";
    let output = print_config(&[], &wrong);
    assert_refused(&output, is_named);
    assert_refused(&output, "--requests <N>");
    assert!(!text(&print_config(&["--requests", "few"], &wrong).stderr).contains(is_named));
    assert!(print_config(&["--requests", "5"], &wrong).status.success());
}

#[test]
fn unknown_variable_is_logged_once_with_the_nearest_name_and_without_its_value() {
    let unknown = [("ISSUE_TRACKER_REQUEST", SECRET), ("ISSUE_TRACKER_SERVICE_HOST", "10.0.0.1")];
    for command in [&["--print-config"][..], &["serve", "--print-config"], &["health", "--listen", "127.0.0.1:1"]] {
        let output = finished(program(command).envs(unknown).spawn().unwrap());
        let warning =
            "unknown environment variable ignored name=\"ISSUE_TRACKER_REQUEST\" nearest=\"ISSUE_TRACKER_REQUESTS\"";
        assert_eq!(text(&output.stderr).matches("unknown environment variable").count(), 1, "{output:?}");
        assert!(text(&output.stderr).contains(warning), "{output:?}");
        assert!(!format!("{output:?}").contains(SECRET), "{output:?}");
    }
}
