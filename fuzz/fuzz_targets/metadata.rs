#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| issue_tracker_fuzz::metadata(data));
