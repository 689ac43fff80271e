//! Creates and registers instruments, and keeps what is read at each scrape.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, Result,
    core::Collector,
};

/// Registers the instruments that it creates.
#[derive(Default)]
pub(super) struct Registration {
    pub registry: Registry,
    pub sources: Arc<Sources>,
}

impl Registration {
    pub fn counter(&self, name: &str, help: &str) -> Result<IntCounter> {
        self.register(IntCounter::new(name, help)?)
    }

    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec> {
        self.register(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    pub fn gauge(&self, name: &str, help: &str) -> Result<IntGauge> {
        self.register(IntGauge::new(name, help)?)
    }

    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec> {
        self.register(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    pub fn histograms(&self, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> Result<HistogramVec> {
        self.register_histograms(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels)
    }

    pub fn register_histograms(&self, options: HistogramOpts, labels: &[&str]) -> Result<HistogramVec> {
        self.register(HistogramVec::new(options, labels)?)
    }

    fn register<C: Collector + Clone + 'static>(&self, instrument: C) -> Result<C> {
        self.registry.register(Box::new(instrument.clone()))?;
        Ok(instrument)
    }
}

/// Updates gauges from the state that they show. Returns `None` if that state does not exist any more.
type Source = Box<dyn Fn() -> Option<()> + Send>;

/// State that is read at each scrape instead of being recorded as it changes.
#[derive(Default)]
pub(super) struct Sources(Mutex<Vec<Source>>);

impl Sources {
    pub fn add(&self, source: impl Fn() -> Option<()> + Send + 'static) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(source));
    }

    /// Updates the gauges of all state.
    pub fn read(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|update| update().is_some());
    }
}
