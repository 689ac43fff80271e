//! Measurements, and the table of ratios that is printed.

use std::time::Duration;

use serde_json::{Value, json};

use crate::load::Operation;

/// The measurements of one side of one round.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub per_second: f64,
    pub p50_us: u32,
    pub p95_us: u32,
    pub p99_us: u32,
    /// Calls that failed or returned a wrong response.
    pub errors: u64,
}

impl Outcome {
    pub fn new(mut latencies_us: Vec<u32>, elapsed: Duration, errors: u64) -> Self {
        latencies_us.sort_unstable();
        let at = |share: f64| {
            let index = (latencies_us.len() as f64 * share) as usize;
            latencies_us.get(index.min(latencies_us.len().saturating_sub(1))).copied().unwrap_or_default()
        };
        Self {
            per_second: latencies_us.len() as f64 / elapsed.as_secs_f64(),
            p50_us: at(0.50),
            p95_us: at(0.95),
            p99_us: at(0.99),
            errors,
        }
    }

    pub fn to_json(&self) -> Value {
        let Self { per_second, p50_us, p95_us, p99_us, errors } = self;
        json!({"per_second": per_second, "p50_us": p50_us, "p95_us": p95_us, "p99_us": p99_us, "errors": errors})
    }

    pub fn from_json(value: &Value) -> Option<Self> {
        let number = |name: &str| value[name].as_u64();
        Some(Self {
            per_second: value["per_second"].as_f64()?,
            p50_us: number("p50_us")? as u32,
            p95_us: number("p95_us")? as u32,
            p99_us: number("p99_us")? as u32,
            errors: number("errors")?,
        })
    }
}

/// One figure of the service, the baseline's figure if there is one, and the number of failed calls.
#[derive(Clone, Debug)]
pub struct Single {
    pub unit: &'static str,
    pub baseline: Option<f64>,
    pub service: f64,
    pub errors: u64,
}

#[derive(Default)]
pub struct Table {
    rows: Vec<Value>,
    errors: u64,
}

impl Table {
    pub fn add(&mut self, operation: &Operation, rounds: &[(Outcome, Outcome)]) {
        let side = |pick: fn(&(Outcome, Outcome)) -> &Outcome| {
            let of = |figure: fn(&Outcome) -> f64| median(rounds.iter().map(|round| figure(pick(round))).collect());
            json!({
                "per_second": of(|o| o.per_second).round(), "p50_us": of(|o| f64::from(o.p50_us)),
                "p95_us": of(|o| f64::from(o.p95_us)), "p99_us": of(|o| f64::from(o.p99_us)),
            })
        };
        let ratios = rounds.iter().map(|(baseline, service)| match operation.by_latency {
            true => f64::from(service.p50_us) / f64::from(baseline.p50_us),
            false => service.per_second / baseline.per_second,
        });
        self.errors += rounds.iter().map(|(_, service)| service.errors).sum::<u64>();
        self.rows.push(json!({
            "operation": operation.name, "service": side(|round| &round.1), "baseline": side(|round| &round.0),
            "ratio": median(ratios.collect()), "of": if operation.by_latency { "p50" } else { "rate" },
            "target": operation.target,
        }));
    }

    pub fn add_single(&mut self, name: &str, target: &str, rounds: &[Single]) {
        let of = |figure: fn(&Single) -> Option<f64>| {
            let figures: Vec<_> = rounds.iter().filter_map(figure).collect();
            if figures.is_empty() { None } else { Some(median(figures)) }
        };
        self.errors += rounds.iter().map(|round| round.errors).sum::<u64>();
        let unit = rounds.first().map_or("", |round| round.unit);
        self.rows.push(json!({
            "operation": name, "unit": unit, "service_figure": of(|s| Some(s.service)), "baseline_figure": of(|s| s.baseline),
            "ratio": of(|s| s.baseline.map(|baseline| s.service / baseline)), "of": unit, "target": target,
        }));
    }

    pub fn errors(&self) -> Option<u64> {
        Some(self.errors).filter(|errors| *errors > 0)
    }

    pub fn print(&self) {
        println!("| operation | service | p50/p95/p99 µs | baseline | p50/p95/p99 µs | ratio | target |");
        println!("|---|---|---|---|---|---|---|");
        for row in &self.rows {
            let text = |name: &str| row[name].as_str().unwrap_or_default();
            let number = |side: &Value, name: &str| format!("{:.0}", side[name].as_f64().unwrap_or_default());
            let side = |name: &str| match (row.get(name), row[format!("{name}_figure")].as_f64()) {
                (Some(side), _) => {
                    let latencies = ["p50_us", "p95_us", "p99_us"].map(|name| number(side, name)).join(" / ");
                    (format!("{}/s", number(side, "per_second")), latencies)
                }
                (None, Some(figure)) => (format!("{figure:.1} {}", text("unit")), String::new()),
                (None, None) => (String::new(), String::new()),
            };
            let ratio = row["ratio"].as_f64().map(|ratio| format!("{ratio:.2} ({})", text("of"))).unwrap_or_default();
            let ((service, service_latencies), (baseline, baseline_latencies)) = (side("service"), side("baseline"));
            println!(
                "| {} | {service} | {service_latencies} | {baseline} | {baseline_latencies} | {ratio} | {} |",
                text("operation"),
                text("target"),
            );
        }
    }

    pub fn print_json(&self) {
        println!("{:#}", json!({"operations": self.rows, "errors": self.errors}));
    }
}

pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or_default()
}
