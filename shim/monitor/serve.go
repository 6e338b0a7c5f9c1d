package monitor

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// ParseAddress tells whether a Monitor may be served at an address: on a Unix socket, for which it returns true, or on the loopback interface. Nothing that
// it serves is asked for with a password, so that no other machine may reach it.
func ParseAddress(address string) (unix bool, err error) {
	if strings.HasPrefix(address, "unix://") || strings.HasPrefix(address, "/") {
		return true, nil
	}
	at, err := netip.ParseAddrPort(address)
	if err != nil || !at.Addr().IsLoopback() {
		return false, fmt.Errorf("address %q: it is 127.0.0.1:PORT, [::1]:PORT or unix:///path, so that no other machine can reach it", address)
	}
	return false, nil
}

// NewServer returns a server that whoever connects to it cannot hold up.
func (m *Monitor) NewServer() *http.Server {
	return &http.Server{
		Handler:           m.Handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      20 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
	}
}

// Handler serves /metrics, /healthz and /readyz.
func (m *Monitor) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		m.answer(w, r, nil)
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		m.answer(w, r, m.ready(r.Context()))
	})
	return mux
}

// answer says that all is well, or why not, and what has happened lately: for people, or with ?format=json for programs.
func (m *Monitor) answer(w http.ResponseWriter, r *http.Request, reasons []error) {
	type answer struct {
		OK      bool     `json:"ok"`
		Reasons []string `json:"reasons"`
		Events  []Event  `json:"events"` // the latest first
	}
	a := answer{OK: len(reasons) == 0, Reasons: []string{}, Events: m.events.recent()}
	for _, reason := range reasons {
		a.Reasons = append(a.Reasons, strings.ReplaceAll(reason.Error(), "\n", "; "))
	}
	asJSON := r.URL.Query().Get("format") == "json"
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if asJSON {
		w.Header().Set("Content-Type", "application/json")
	}
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if !a.OK {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	// An error means that nobody reads it any more.
	if asJSON {
		_ = json.NewEncoder(w).Encode(a)
		return
	}
	var text strings.Builder
	if a.OK {
		text.WriteString("ok\n")
	}
	for _, reason := range a.Reasons {
		fmt.Fprintln(&text, reason)
	}
	if len(a.Events) > 0 {
		text.WriteString("\nlately, the latest first:\n")
	}
	for _, e := range a.Events {
		fmt.Fprintf(&text, "%s  %s: %s\n", e.Time.Format(time.RFC3339), e.Kind, e.Text)
	}
	_, _ = w.Write([]byte(text.String()))
}
