//! The load of a control run: a client that is as busy as the one that abused the service, and sends to a sink.

use std::{
    collections::VecDeque,
    net::TcpListener as StdListener,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{HeaderMap, Request, Response};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
    sync::oneshot,
    time::sleep,
};

use super::{
    long::thread_cpu,
    traffic::{Connector, TrafficCounts},
};

const TICK: Duration = Duration::from_millis(5);
/// Large enough that no call waits for a window.
const WINDOW_BYTES: u32 = 4 << 20;
/// What is transferred if the client sends bytes without beginning calls.
const TRANSFERS_PER_SECOND_MIN: f64 = 20.0;
/// How many calls wait for a sink that is slower than the service.
const IN_FLIGHT_MAX: usize = 2_000;
const RESPONSE_BYTES: &str = "x-response-bytes";

/// How busy a client is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Busyness {
    pub connections: usize,
    pub connections_per_second: f64,
    pub calls_per_second: f64,
    pub sent_per_second: f64,
    pub received_per_second: f64,
    /// Processor time per time.
    pub cpu: f64,
}

impl Busyness {
    /// `cpu`: the processor time of the client's thread.
    pub fn between(before: &TrafficCounts, after: &TrafficCounts, elapsed: Duration, cpu: Duration) -> Self {
        let seconds = elapsed.as_secs_f64();
        let rate = |count: fn(&TrafficCounts) -> u64| (count(after) - count(before)) as f64 / seconds;
        Self {
            connections: after.open as usize,
            connections_per_second: rate(|counts| counts.opened),
            calls_per_second: rate(|counts| counts.calls),
            sent_per_second: rate(|counts| counts.sent_bytes),
            received_per_second: rate(|counts| counts.received_bytes),
            cpu: cpu.as_secs_f64() / seconds,
        }
    }
}

/// An HTTP/2 server that discards requests, until this is dropped.
pub struct Sink {
    address: String,
    _stop: oneshot::Sender<()>,
}

impl Sink {
    pub fn start() -> Self {
        let listener = StdListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (stop, stopped) = oneshot::channel::<()>();
        std::thread::spawn(move || {
            runtime().block_on(async {
                let listener = TcpListener::from_std(listener).unwrap();
                tokio::select! {
                    () = accept(listener) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { address, _stop: stop }
    }
}

pub fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

async fn accept(listener: TcpListener) {
    while let Ok((tcp, _)) = listener.accept().await {
        let _ = tcp.set_nodelay(true);
        tokio::spawn(serve(tcp));
    }
}

async fn serve(tcp: TcpStream) -> Result<(), h2::Error> {
    let mut builder = h2::server::Builder::new();
    builder.initial_window_size(WINDOW_BYTES).initial_connection_window_size(WINDOW_BYTES);
    let mut connection = builder.handshake::<_, Bytes>(tcp).await?;
    while let Some(accepted) = connection.accept().await {
        let (request, response) = accepted?;
        tokio::spawn(discard(request, response));
    }
    Ok(())
}

async fn discard(request: Request<RecvStream>, mut response: SendResponse<Bytes>) -> Result<(), h2::Error> {
    let bytes = request.headers().get(RESPONSE_BYTES).and_then(|bytes| bytes.to_str().ok()?.parse().ok());
    let mut body = request.into_body();
    while let Some(data) = body.data().await {
        body.flow_control().release_capacity(data?.len())?;
    }
    let mut stream = response.send_response(Response::new(()), false)?;
    stream.send_data(vec![0; bytes.unwrap_or(0)].into(), false)?;
    stream.send_trailers(HeaderMap::new())
}

/// A client that loads a sink, on a thread of its own.
pub struct BusyClient {
    stopping: Arc<AtomicBool>,
    thread: JoinHandle<Busyness>,
}

impl BusyClient {
    pub fn start(target: Busyness, sink: &Sink) -> Self {
        let (stopping, connector) = (Arc::<AtomicBool>::default(), Connector::new(&sink.address));
        let thread = std::thread::spawn({
            let stopping = Arc::clone(&stopping);
            move || runtime().block_on(load(target, &connector, &stopping))
        });
        Self { stopping, thread }
    }

    /// Returns how busy it was.
    pub fn stop(self) -> Busyness {
        self.stopping.store(true, Relaxed);
        self.thread.join().unwrap()
    }
}

async fn load(target: Busyness, connector: &Connector, stopping: &AtomicBool) -> Busyness {
    let bytes_per_second = target.sent_per_second + target.received_per_second;
    let min = if bytes_per_second > 0.0 { TRANSFERS_PER_SECOND_MIN } else { 0.0 };
    let calls_per_second = target.calls_per_second.max(min);
    let per_call = |per_second: f64| if calls_per_second > 0.0 { (per_second / calls_per_second) as usize } else { 0 };
    let (sent, received) = (per_call(target.sent_per_second), per_call(target.received_per_second));
    let message = Bytes::from(vec![0; sent]);
    let mut connections = VecDeque::new();
    for _ in 0..target.connections.max(1) {
        connections.push_back(connector.open_h2(WINDOW_BYTES).await);
    }

    let (began, cpu_before, before) = (Instant::now(), thread_cpu(), connector.traffic().counts());
    let (mut calls_begun, mut connections_opened) = (0_u64, 0_u64);
    let in_flight = Arc::new(());
    while !stopping.load(Relaxed) {
        let passed = began.elapsed().as_secs_f64();
        while (connections_opened as f64) < passed * target.connections_per_second {
            connections.pop_front();
            connections.push_back(connector.open_h2(WINDOW_BYTES).await);
            connections_opened += 1;
        }
        while (calls_begun as f64) < passed * calls_per_second && Arc::strong_count(&in_flight) <= IN_FLIGHT_MAX {
            let nth = calls_begun as usize % connections.len();
            tokio::spawn(call(connections[nth].requests.clone(), message.clone(), received, Arc::clone(&in_flight)));
            calls_begun += 1;
        }
        sleep(TICK).await;
        // What encoding and decoding of messages takes.
        let tick_end = Instant::now() + TICK;
        while (thread_cpu() - cpu_before) < began.elapsed().mul_f64(target.cpu) && Instant::now() < tick_end {
            std::hint::spin_loop();
        }
    }
    let cpu = thread_cpu() - cpu_before;
    Busyness::between(&before, &connector.traffic().counts(), began.elapsed(), cpu)
}

async fn call(
    requests: h2::client::SendRequest<Bytes>,
    message: Bytes,
    response_bytes: usize,
    _in_flight: Arc<()>,
) -> Result<(), h2::Error> {
    let request = Request::post("http://sink/").header(RESPONSE_BYTES, response_bytes).body(()).unwrap();
    let (response, mut stream) = requests.ready().await?.send_request(request, false)?;
    stream.send_data(message, true)?;
    let mut body = response.await?.into_body();
    while let Some(data) = body.data().await {
        body.flow_control().release_capacity(data?.len())?;
    }
    Ok(())
}
