#!/bin/sh
# Roles and databases of Prefect and MLflow; PostgreSQL's image runs this when its data are new.
# A role reaches its own databases only. Passwords come as psql variables, so psql quotes them.
set -eu
psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 \
  --set=prefect_password="$PREFECT_DATABASE_PASSWORD" \
  --set=mlflow_password="$MLFLOW_DATABASE_PASSWORD" \
  --username "$POSTGRES_USER" --dbname postgres <<'SQL'
create role prefect login password :'prefect_password';
create role mlflow login password :'mlflow_password';
create database prefect owner prefect;
create database mlflow owner mlflow;
create database mlflow_auth owner mlflow;
revoke all on database prefect, mlflow, mlflow_auth from public;
SQL
