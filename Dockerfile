# docker build -t parley .
# docker buildx build --platform linux/amd64,linux/arm64 --build-arg VERSION=v1.2.3 --build-arg COMMIT=$(git rev-parse HEAD) .

# Go compiles for any platform, so nothing is emulated.
FROM --platform=$BUILDPLATFORM golang:1.26-alpine AS build
WORKDIR /src
COPY . .
ARG TARGETOS TARGETARCH VERSION COMMIT
ENV CGO_ENABLED=0
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
	GOOS=$TARGETOS GOARCH=$TARGETARCH go build -buildvcs=false -trimpath -ldflags "-s -w -X main.version=$VERSION -X main.commit=$COMMIT" -o /parley .

FROM scratch
# Of these roots come those who sign for JWT_JWKS_URL and rediss://.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /parley /parley
# An image is for others to reach, so unlike the bare binary it is not for
# development. The demo page stays on: whoever starts it sees at once that it works.
ENV DEV=false DEMO=true
# A number, so that Kubernetes can tell that it is not root.
USER 65532:65532
EXPOSE 1234
HEALTHCHECK --interval=10s --timeout=5s CMD ["/parley", "healthcheck"]
ENTRYPOINT ["/parley"]
