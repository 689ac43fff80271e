//! Metrics of RPC calls.

use std::{sync::OnceLock, time::Instant};

use prometheus::{Histogram, HistogramOpts, HistogramVec, IntGauge, Result};

use super::registration::Registration;

/// The boundaries that OpenTelemetry recommends, and finer ones for calls that take a few milliseconds.
const DURATIONS: [f64; 18] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0];
/// The names of gRPC's status codes, by their numbers.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];
const CANCELLED: usize = 1;
const UNKNOWN: usize = 2;

/// Metrics of RPC calls.
pub struct Calls {
    durations: HistogramVec,
    methods: Vec<Method>,
}

struct Method {
    name: String,
    in_flight: IntGauge,
    /// By status code. Created with the first call: most methods end with a few of them.
    durations: [OnceLock<Histogram>; CODES.len()],
}

impl Calls {
    pub(super) fn new(new: &Registration, methods: &[String]) -> Result<Self> {
        let options = HistogramOpts::new(
            "rpc_server_call_duration_seconds",
            "Time from the headers of a call to the end of its response.",
        );
        let options = options.buckets(DURATIONS.to_vec()).const_label("rpc_system_name", "grpc");
        let durations = new.register_histograms(options, &["rpc_method", "rpc_response_status_code"])?;
        let in_flight = new.gauges("issue_tracker_calls_in_flight", "Calls in flight.", &["rpc_method"])?;
        let method = |name: &String| Method {
            name: name.clone(),
            in_flight: in_flight.with_label_values(&[name]),
            durations: [const { OnceLock::new() }; CODES.len()],
        };
        Ok(Self { durations, methods: methods.iter().map(method).collect() })
    }

    /// Begins a call of the method with this index.
    pub fn begin(&'static self, method: u16) -> Option<CallTimer> {
        let method = self.methods.get(usize::from(method)).or(self.methods.first())?;
        method.in_flight.inc();
        Some(CallTimer { calls: self, method, began: Instant::now(), code: CANCELLED })
    }
}

/// A call in flight. Dropped, it is recorded, as cancelled by the client if it has no status code.
pub struct CallTimer {
    calls: &'static Calls,
    method: &'static Method,
    began: Instant,
    code: usize,
}

impl CallTimer {
    /// Sets the number of the status code with which the call ends.
    pub fn set_code(&mut self, code: i32) {
        self.code = usize::try_from(code).ok().filter(|code| *code < CODES.len()).unwrap_or(UNKNOWN);
    }
}

impl Drop for CallTimer {
    fn drop(&mut self) {
        let Self { calls, method, began, code } = *self;
        method.in_flight.dec();
        let duration =
            method.durations[code].get_or_init(|| calls.durations.with_label_values(&[&*method.name, CODES[code]]));
        duration.observe(began.elapsed().as_secs_f64());
    }
}
