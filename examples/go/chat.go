// Streams an answer: go run . "What is the capital of Japan?"
//
// LONGSPAN_HOST and LONGSPAN_PORT name the server. With LONGSPAN_CA, a file with its root certificate, or
// LONGSPAN_TLS=1, for roots that this machine knows, it is called by TLS; without, only on this machine.
// LONGSPAN_TOKEN is shown to it.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/local"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "example/chat/gen/longspan/v1"
)

const (
	attempts = 3
	deadline = time.Minute
)

func main() {
	content := "What is the capital of Japan?"
	if len(os.Args) > 1 {
		content = os.Args[1]
	}
	// Ctrl-C cancels the call, and the server frees the request's pages at once.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, content); err != nil && ctx.Err() == nil {
		fmt.Fprintf(os.Stderr, "%s: %s\n", status.Code(err), status.Convert(err).Message())
		os.Exit(1)
	}
}

// run asks, and asks again where the server says when.
func run(ctx context.Context, content string) error {
	transport, err := transportCredentials()
	if err != nil {
		return err
	}
	address := net.JoinHostPort(setting("LONGSPAN_HOST", "127.0.0.1"), setting("LONGSPAN_PORT", "50051"))
	connection, err := grpc.NewClient(address, grpc.WithTransportCredentials(transport))
	if err != nil {
		return err
	}
	defer connection.Close()
	if token := os.Getenv("LONGSPAN_TOKEN"); token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	client := pb.NewInferenceServiceClient(connection)
	for attempt := 1; ; attempt++ {
		begun, err := stream(ctx, client, content)
		wait, told := retryDelay(err)
		// An answer that has begun is not begun again.
		if err == nil || begun || !told || attempt == attempts {
			return err
		}
		fmt.Fprintf(os.Stderr, "%s; asking again in %s\n", status.Convert(err).Message(), wait)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// stream prints an answer as it comes, and reports whether any of it has come.
func stream(ctx context.Context, client pb.InferenceServiceClient, content string) (begun bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	temperature, tokens := float32(0), uint32(40)
	events, err := client.StreamGenerate(ctx, &pb.StreamGenerateRequest{Request: &pb.GenerateRequest{
		Prompt: &pb.GenerateRequest_Chat{Chat: &pb.Chat{
			Messages: []*pb.ChatMessage{{Role: "user", Content: content}},
		}},
		Sampling: &pb.SamplingParams{Temperature: &temperature},
		Stop:     &pb.StopConditions{MaxTokens: &tokens},
	}})
	if err != nil {
		return false, err
	}
	for {
		event, err := events.Recv()
		if errors.Is(err, io.EOF) {
			return true, nil
		}
		if err != nil {
			return begun, err
		}
		if delta := event.GetDelta(); delta != nil {
			begun = true
			fmt.Print(delta.GetText())
		}
		if finished := event.GetFinished(); finished != nil {
			fmt.Printf("\n%d tokens\n", finished.GetUsage().GetCompletionTokens())
		}
	}
}

// retryDelay is after how long the server would be asked again, if it says so.
func retryDelay(err error) (time.Duration, bool) {
	for _, detail := range status.Convert(err).Details() {
		if retry, ok := detail.(*errdetails.RetryInfo); ok {
			delay := retry.GetRetryDelay()
			return time.Duration(delay.GetSeconds())*time.Second + time.Duration(delay.GetNanos()), true
		}
	}
	return 0, false
}

func transportCredentials() (credentials.TransportCredentials, error) {
	if root := os.Getenv("LONGSPAN_CA"); root != "" {
		return credentials.NewClientTLSFromFile(root, "")
	}
	if os.Getenv("LONGSPAN_TLS") != "" {
		return credentials.NewTLS(&tls.Config{}), nil
	}
	// In plain text, and so to this machine only.
	return local.NewCredentials(), nil
}

func setting(name, usual string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return usual
}
