//! Identifies the caller by the token in the metadata `authorization`.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::future::{BoxFuture, Either};
use http::{HeaderMap, Request};
use tokio::time::sleep;
use tower::{Layer, Service};

use super::{admission::flow, method_policy::CallPolicy, retry::Attempts};
use crate::{
    auth::{Auth, Caller},
    error::{Error, Result},
    fairness::Flow,
    transport::activity::CallHandle,
};

/// Attaches the [`Caller`] to requests that need credentials. Fails with `Unauthenticated` without a valid token.
#[derive(Clone)]
pub struct AuthenticationLayer {
    auth: Arc<Auth>,
}

impl AuthenticationLayer {
    pub fn new(auth: Auth) -> Self {
        Self { auth: Arc::new(auth) }
    }
}

impl<S> Layer<S> for AuthenticationLayer {
    type Service = Authentication<S>;

    fn layer(&self, inner: S) -> Authentication<S> {
        Authentication { auth: Arc::clone(&self.auth), inner }
    }
}

/// The service of [`AuthenticationLayer`].
#[derive(Clone)]
pub struct Authentication<S> {
    auth: Arc<Auth>,
    inner: S,
}

impl<S, B> Service<Request<B>> for Authentication<S>
where
    S: Service<Request<B>, Error = Error, Future: Send> + Clone + Send + 'static,
    B: Send + 'static,
{
    type Response = S::Response;
    type Error = Error;
    type Future = Either<S::Future, BoxFuture<'static, Result<S::Response>>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        if CallPolicy::of(&request).role().is_none() {
            return Either::Left(self.inner.call(request));
        }
        let (auth, mut inner) = (Arc::clone(&self.auth), self.inner.clone());
        Either::Right(Box::pin(async move {
            let caller = authenticate(&auth, request.headers(), flow(request.extensions())).await?;
            request.extensions_mut().insert(caller);
            if let Some(call) = request.extensions().get::<CallHandle>() {
                call.mark_authenticated();
            }
            inner.call(request).await
        }))
    }
}

/// Looks up the token, again if the connection to the database is lost.
async fn authenticate(auth: &Auth, headers: &HeaderMap, client: Flow) -> Result<Caller> {
    let mut attempts = Attempts::default();
    loop {
        let error = match auth.authenticate(headers, client).await {
            Ok(caller) => return Ok(caller),
            Err(error) => error,
        };
        match attempts.next_delay(&error) {
            Some(delay) => sleep(delay).await,
            None => return Err(error),
        }
    }
}
