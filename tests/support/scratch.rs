//! The directory for the files of tests.

use std::{ffi::CString, fs, mem::MaybeUninit, path::PathBuf};

const MEMORY_DIR: &str = "/dev/shm";
/// Several times what one test binary needs at once.
const FREE_BYTES_MIN: u64 = 4 << 30;

/// Returns the directory for the clusters and other files of tests: `/dev/shm`, if it has 4 GiB of free memory and
/// programs in it can be executed, or else the directory for temporary files.
///
/// Tests kill processes but never the machine, so none of them needs a disk, and on a disk most of the processor time of
/// a test is spent in the file system.
pub fn scratch_dir() -> PathBuf {
    if has_free_space() && available_memory_bytes() >= FREE_BYTES_MIN {
        PathBuf::from(MEMORY_DIR)
    } else {
        std::env::temp_dir()
    }
}

fn has_free_space() -> bool {
    let path = CString::new(MEMORY_DIR).unwrap();
    let mut stat = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: both pointers outlive the call, which fills the structure if it returns zero.
    let stat = unsafe {
        if libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) != 0 {
            return false;
        }
        stat.assume_init()
    };
    stat.f_flag & libc::ST_NOEXEC == 0 && stat.f_bavail * stat.f_frsize >= FREE_BYTES_MIN
}

fn available_memory_bytes() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
