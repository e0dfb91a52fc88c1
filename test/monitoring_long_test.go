//go:build long

package test

import (
	"fmt"
	"os/exec"
	"parley/test/testkit"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// Prometheus itself reads what deploy/ has for it, tries the alerts, and reads
// each query of the dashboard.
func TestLongPrometheus(t *testing.T) {
	promtool := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(needTool(t, "promtool"), args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	promtool("check", "rules", "deploy/prometheus/alerts.yaml")
	promtool("test", "rules", "deploy/prometheus/alerts_test.yaml")

	dir := t.TempDir()
	testkit.WriteFile(t, filepath.Join(dir, "parley-alerts.yaml"), readFile(t, "deploy/prometheus/alerts.yaml"))
	scrape := filepath.Join(dir, "prometheus.yml")
	testkit.WriteFile(t, scrape, readFile(t, "deploy/prometheus/scrape.yaml"))
	promtool("check", "config", scrape)

	dashboard := readDashboard(t)
	fill := strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*", "$job", "parley") // as Grafana does
	group := alertGroup{Name: "dashboard"}
	add := func(query string) {
		group.Rules = append(group.Rules, alertRule{Record: fmt.Sprint("dashboard:query:", len(group.Rules)), Expr: fill.Replace(query)})
	}
	for _, a := range dashboard.Annotations.List {
		add(a.Expr)
	}
	for _, p := range dashboard.Panels {
		for _, q := range p.Targets {
			add(q.Expr)
		}
	}
	text, err := yaml.Marshal(alertRules{[]alertGroup{group}})
	if err != nil {
		t.Fatal(err)
	}
	rules := filepath.Join(dir, "dashboard.yaml")
	testkit.WriteFile(t, rules, string(text))
	promtool("check", "rules", rules)
}
