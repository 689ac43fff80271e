//! Tests the shell completions and the manual pages.

use super::*;

/// Runs a program of the system that reads `input`. `None` if it is not installed.
fn run_system(program: &str, args: &[&str], input: &[u8]) -> Option<Output> {
    let mut command = std::process::Command::new(program);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        spawned => spawned.unwrap(),
    };
    let (mut stdin, input) = (child.stdin.take().unwrap(), input.to_vec());
    // The write fails when the program exits without reading; callers assert on its output.
    std::thread::spawn(move || stdin.write_all(&input));
    Some(finished(child))
}

/// Returns what bash suggests for the last word, with the completion script of the program.
fn bash_suggestions(script: &[u8], words: &[&str]) -> Vec<String> {
    let complete = "source /dev/stdin
        COMP_WORDS=(\"$@\") COMP_CWORD=$(($# - 1))
        function=$(complete -p issue-tracker | sed -E 's/.*-F ([^ ]+) .*/\\1/')
        \"$function\" issue-tracker \"${!#}\" \"${COMP_WORDS[COMP_CWORD - 1]}\"
        printf '%s\\n' \"${COMPREPLY[@]}\"";
    let args = [&["--norc", "-c", complete, "bash"], words].concat();
    let output = run_system("bash", &args, script).expect("bash is not installed");
    assert!(output.status.success(), "{output:?}");
    text(&output.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_flags_and_values() {
    let script = run(&["completions", "bash"]);
    assert!(script.status.success() && script.stderr.is_empty(), "{script:?}");
    for (words, expected) in [
        (&["issue-tracker", "mig"][..], &["migrate"][..]),
        (&["issue-tracker", "user", "re"], &["reset-password"]),
        (&["issue-tracker", "serve", "--pool-c"], &["--pool-connections"]),
        (&["issue-tracker", "--print"], &["--print-config"]),
        (&["issue-tracker", "import", "--mode", "sk"], &["skip-invalid"]),
    ] {
        assert_eq!(bash_suggestions(&script.stdout, words), expected, "{words:?}");
    }
}

#[test]
fn there_is_a_completion_script_for_each_shell() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let output = run(&["completions", shell]);
        assert!(output.status.success(), "{output:?}");
        for word in ["issue-tracker", "reset-password", "print-config", "pool-connections"] {
            assert!(text(&output.stdout).contains(word), "{shell}: {word}");
        }
    }
    assert_refused(&run(&["completions", "tcsh"]), "[possible values: bash, elvish, fish, powershell, zsh]");
}

#[test]
fn manual_pages_have_all_sections_and_no_formatting_errors() {
    let words = ["serve", "migrate", "user", "health", "import", "export", "completions", "man"];
    let commands = words.iter().map(|word| vec![*word]);
    let pages = [vec![], vec!["user", "create"], vec!["user", "reset-password"]].into_iter().chain(commands);
    for command in pages {
        let page = run(&[&["man"], &command[..]].concat());
        assert!(page.status.success() && page.stderr.is_empty(), "{page:?}");
        let name = ["issue-tracker"].iter().chain(&command).copied().collect::<Vec<_>>().join("-");
        for part in
            [format!(".TH {name} 1"), ".SH NAME".to_owned(), ".SH SYNOPSIS".to_owned(), ".SH DESCRIPTION".to_owned()]
        {
            assert!(text(&page.stdout).contains(&part), "{command:?}: {part}");
        }
        // -ww: all warnings; -z: no output.
        if let Some(formatted) = run_system("groff", &["-man", "-Tutf8", "-ww", "-z"], &page.stdout) {
            assert!(formatted.status.success() && formatted.stderr.is_empty(), "{command:?}: {formatted:?}");
        }
    }
    let program = run(&["man"]);
    for part in ["issue\\-tracker\\-import(1)", "\\-\\-pool\\-connections", "ISSUE_TRACKER_POOL_CONNECTIONS"] {
        assert!(text(&program.stdout).contains(part), "{part}");
    }
    let unknown = run(&["man", "user", "delete"]);
    assert_refused(&unknown, "COMMAND: \"delete\" is unknown; expected one of: create, reset-password");
}

#[test]
fn closed_standard_output_is_no_error() {
    for command in ["man", "completions bash", "serve --print-config"] {
        let pipeline = format!("\"$0\" {command} | true; echo ${{PIPESTATUS[0]}}");
        let output = run_system("bash", &["-c", &pipeline, env!("CARGO_BIN_EXE_issue-tracker")], b"").unwrap();
        assert_eq!((text(&output.stdout), text(&output.stderr)), ("0\n", ""), "{command}");
    }
}
