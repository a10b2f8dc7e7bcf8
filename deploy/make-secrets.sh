#!/bin/sh
# Passwords for compose.yaml in .env (once: a second call changes nothing), and clients.env for the
# shells that run the pipeline. Only their owner can read both.
set -eu
umask 077
cd "$(dirname "$0")"
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
if [ ! -e .env ]; then
  minio=$(random)
  {
    for name in POSTGRES_PASSWORD PREFECT_DATABASE_PASSWORD MLFLOW_DATABASE_PASSWORD \
      PREFECT_LOGIN_PASSWORD MLFLOW_TRACKING_PASSWORD MLFLOW_SESSION_KEY; do
      echo "$name=$(random)"
    done
    echo "MINIO_PASSWORD=$minio"
    echo "# Artifacts in MinIO (docker compose --profile s3 up): take the # of these lines away."
    echo "#ARTIFACTS=s3://mlflow"
    echo "#MLFLOW_S3_ENDPOINT_URL=http://minio:9000"
    echo "#AWS_ACCESS_KEY_ID=ultraflux"
    echo "#AWS_SECRET_ACCESS_KEY=$minio"
  } > .env.new
  mv .env.new .env
fi
# Made before Prefect asked for a login.
grep -q '^PREFECT_LOGIN_PASSWORD=' .env || echo "PREFECT_LOGIN_PASSWORD=$(random)" >> .env
. ./.env
cat > clients.env.new <<CLIENTS
PREFECT_API_URL=http://127.0.0.1:${PREFECT_PORT:-4200}/api
PREFECT_CLIENT_MAX_RETRIES=8
PREFECT_CLIENT_RETRY_EXTRA_CODES=500
MLFLOW_TRACKING_URI=http://127.0.0.1:${MLFLOW_PORT:-5000}
MLFLOW_TRACKING_USERNAME=admin
MLFLOW_TRACKING_PASSWORD=$MLFLOW_TRACKING_PASSWORD
PREFECT_API_AUTH_STRING=admin:$PREFECT_LOGIN_PASSWORD
CLIENTS
mv clients.env.new clients.env
