-- Creates the database, the role that owns the schema and the role that serves. Run once per cluster by a superuser, also
-- before a backup is restored into a new cluster:
--
--     OWNER_PASSWORD='secret' SERVICE_PASSWORD='another secret' psql -f roles.sql -d postgres
--
-- The passwords come from the environment, so that they are in no process list. psql quotes them (:'name').
\set ON_ERROR_STOP on
\getenv owner_password OWNER_PASSWORD
\getenv service_password SERVICE_PASSWORD
-- Neither the statements nor the passwords in them reach the log of the server.
SET log_statement = 'none';
SET log_min_error_statement = 'panic';
SET log_min_duration_statement = -1;
CREATE ROLE tracker_owner LOGIN PASSWORD :'owner_password';
CREATE ROLE tracker LOGIN PASSWORD :'service_password';
CREATE DATABASE tracker OWNER tracker_owner;
REVOKE ALL ON DATABASE tracker FROM PUBLIC;
GRANT CONNECT ON DATABASE tracker TO tracker;
