package relay

import "sync/atomic"

// Stats is what has passed since New, and what there is now. Each number is right by itself; together they are not of one moment.
type Stats struct {
	Accepted    int64    // connections
	Connections int      // that there are now
	Streams     int      // that both sides may still send on
	Methods     []Method // one for each of Config.Counted, in its order, and at last one without a path, for all others
}

// Method is what has passed of the streams with one path. Bytes are those of DATA frames, with what gRPC and padding add to messages.
type Method struct {
	Path      string
	Streams   int64 // that clients have opened, whoever answers
	Served    int64 // of them, those that were served in this process
	Requests  int64 // bytes that have come from clients
	Responses int64 // bytes that have come from the runtime, or from handlers
}

// counters are those of one path. A stream knows its own, so that a frame costs an addition and nothing else. They are never reset.
type counters struct {
	streams, served, requests, responses atomic.Int64
}

// Stats may be called at any time.
func (s *Server) Stats() Stats {
	stats := Stats{Accepted: s.accepted.Load()}
	for _, path := range s.cfg.Counted {
		stats.Methods = append(stats.Methods, s.routes[path].counters.method(path))
	}
	stats.Methods = append(stats.Methods, s.other.counters.method(""))
	s.mu.Lock()
	defer s.mu.Unlock()
	stats.Connections = len(s.links)
	for l := range s.links {
		l.mu.Lock()
		stats.Streams += len(l.streams)
		l.mu.Unlock()
	}
	return stats
}

func (c *counters) method(path string) Method {
	return Method{
		Path: path, Streams: c.streams.Load(), Served: c.served.Load(), Requests: c.requests.Load(), Responses: c.responses.Load(),
	}
}
